// Shared by the kernels on the tensor cores: tiles in shared memory, asynchronous copies, and 16 x 8 x 16 products.
//
// Tiles consist of chunks of 8 half-precision elements (16 bytes). A row of a tile has CHUNKS of them. Their order
// depends on the row, so that the eight rows that one ldmatrix reads are in different banks.

template <int CHUNKS> __device__ __forceinline__ int chunk_place(int row, int chunk)
{
    constexpr int rows_per_line = CHUNKS < 8 ? 8 / CHUNKS : 1;  // a line is all 32 banks: 128 bytes
    constexpr int mask = CHUNKS < 8 ? CHUNKS - 1 : 7;
    return row * CHUNKS + (chunk ^ ((row / rows_per_line) & mask));
}

__device__ __forceinline__ unsigned shared_address(const void *pointer)
{
    return (unsigned)__cvta_generic_to_shared(pointer);
}

// Copies a chunk from device to shared memory, or zeros if it is not valid.
__device__ __forceinline__ void copy_chunk(unsigned target, const void *source, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void wait_for_copies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Loads four 8 x 8 matrices. The address that lane 8 i + r passes is that of row r of matrix i.
__device__ __forceinline__ void load_matrices(unsigned (&matrices)[4], unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(unsigned (&matrices)[4], unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

// sums += a b, for a of 16 x 16 and b of 16 x 8 elements.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, f16)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
