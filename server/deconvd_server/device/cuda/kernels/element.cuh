// The element types. CUDA's headers are not used: a host that compiles at run time may not have them.
// The text of this header, and of the others, precedes every .cu file when it is compiled.

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};
using f32 = float;
using f64 = double;

// The type in which products of elements are summed.
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

// Rounds to nearest even. A double is rounded to float32 before it is rounded to bfloat16, as in ml_dtypes.
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

// Elements that one instruction loads or stores.
template <typename T, int count> struct alignas(sizeof(T) * count) Vector {
    T values[count];
};

template <typename T> __device__ __forceinline__ bool is_aligned(const T *pointer)
{
    return (size_t)pointer % 16 == 0;
}
