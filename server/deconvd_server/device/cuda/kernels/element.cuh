// The element types, without CUDA's headers: a host that compiles at run time may have none.
// Every .cu file here is compiled with this text in front of it, and that of the other headers.

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};
using f32 = float;
using f64 = double;

// The type that products of elements are summed in.
template <typename T> struct Compute {
    using type = float;
};
template <> struct Compute<f64> {
    using type = double;
};

__device__ __forceinline__ float widen(f16 value)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}
__device__ __forceinline__ float widen(bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
__device__ __forceinline__ float widen(f32 value) { return value; }
__device__ __forceinline__ double widen(f64 value) { return value; }

// Rounds to nearest even. A double goes to bfloat16 through float32, as in ml_dtypes.
__device__ __forceinline__ void narrow(f16 &out, float value)
{
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
}
__device__ __forceinline__ void narrow(f16 &out, double value)
{
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(out.bits) : "d"(value));
}
__device__ __forceinline__ void narrow(bf16 &out, float value)
{
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
}
__device__ __forceinline__ void narrow(bf16 &out, double value) { narrow(out, (float)value); }
__device__ __forceinline__ void narrow(f32 &out, float value) { out = value; }
__device__ __forceinline__ void narrow(f32 &out, double value) { out = (float)value; }
__device__ __forceinline__ void narrow(f64 &out, double value) { out = value; }

template <typename T, typename V> __device__ __forceinline__ T narrowed(V value)
{
    T out;
    narrow(out, value);
    return out;
}

// Elements that are loaded and stored by one instruction.
template <typename T, int count> struct alignas(sizeof(T) * count) Vector {
    T values[count];
};

template <typename T> __device__ __forceinline__ bool is_aligned(const T *pointer)
{
    return (size_t)pointer % 16 == 0;
}
