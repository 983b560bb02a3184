// gb: sums of gy over samples and pixels. The order of every sum is fixed, so that two runs give the same bits.
//
// Macros, from elementwise.py: ELEMENT, THREADS, CLUSTER.

using Index = long long;
using Sum = Compute<ELEMENT>::type;

// Returns one thread's sum: of the vectors first, first + step, ... of a channel's rows, counted from row to row.
//
// It counts (row, column), since a division at every step would be slow.
template <int width>
__device__ Sum sum_of_thread(const ELEMENT *gy, Index rows, Index row_stride, Index pixels, Index first, Index step)
{
    using Elements = Vector<ELEMENT, width>;
    const Index columns = pixels / width;
    const Index row_step = step / columns, column_step = step % columns;
    Index row = first / columns, column = first % columns;
    Sum sum = 0;
#pragma unroll 4
    while (row < rows) {
        const Elements elements = *(const Elements *)(gy + row * row_stride + column * width);
#pragma unroll
        for (int j = 0; j < width; ++j) sum += widen(elements.values[j]);
        row += row_step;
        column += column_step;
        if (column >= columns) {
            column -= columns;
            ++row;
        }
    }
    return sum;
}

// Returns the sum over a block's threads. Only the first thread gets it.
__device__ double sum_of_block(double value)
{
    __shared__ double sums[THREADS / 32];
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    if (threadIdx.x == 0)
        for (double sum : sums) value += sum;
    return value;
}

__device__ Sum sum_of_channel_part(const ELEMENT *gy, int samples, int channels, Index pixels, int channel, int part,
                                   int parts)
{
    const ELEMENT *first = gy + channel * pixels;
    const Index thread = part * THREADS + threadIdx.x, step = (Index)parts * THREADS;
    constexpr int width = 16 / sizeof(ELEMENT);
    if (is_aligned(gy) && pixels % width == 0)
        return sum_of_thread<width>(first, samples, channels * pixels, pixels, thread, step);
    return sum_of_thread<1>(first, samples, channels * pixels, pixels, thread, step);
}

// One block for each channel.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_channels(const ELEMENT *gy, ELEMENT *gb, int samples, int channels, Index pixels)
{
    const double sum = sum_of_block(sum_of_channel_part(gy, samples, channels, pixels, blockIdx.x, 0, 1));
    if (threadIdx.x == 0) narrow(gb[blockIdx.x], sum);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void wait_for_cluster()
{
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ double read_from_block(const double *shared, int rank)
{
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    double value;
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(address));
    return value;
}

// A cluster of blocks for each channel, for tensors of few channels: one block for each would leave the card idle.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS)
sum_few_channels(const ELEMENT *gy, ELEMENT *gb, int samples, int channels, Index pixels)
{
    __shared__ double part_sum;
    const int channel = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
    const double sum = sum_of_block(sum_of_channel_part(gy, samples, channels, pixels, channel, rank, CLUSTER));
    if (threadIdx.x == 0) part_sum = sum;
    wait_for_cluster();
    if (rank == 0 && threadIdx.x == 0) {
        double total = 0;
        for (int other = 0; other < CLUSTER; ++other) total += read_from_block(&part_sum, other);
        narrow(gb[channel], total);
    }
    wait_for_cluster();  // a block's shared memory must outlive the block that reads it
}
#else
// For cards without clusters: the first block of each CLUSTER does the work of all.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_few_channels(const ELEMENT *gy, ELEMENT *gb, int samples, int channels, Index pixels)
{
    const int channel = blockIdx.x / CLUSTER;
    if (blockIdx.x % CLUSTER) return;
    const double sum = sum_of_block(sum_of_channel_part(gy, samples, channels, pixels, channel, 0, 1));
    if (threadIdx.x == 0) narrow(gb[channel], sum);
}
#endif
