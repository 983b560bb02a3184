// Crops images at the far edge, or extends them with zeros: copies the part that two sizes of an image share.
//
// Macros, from crop.py: ELEMENT, THREADS.

extern "C" __global__ void __launch_bounds__(THREADS)
crop(const ELEMENT *source, ELEMENT *target, long long count, int source_h, int source_w, int target_h, int target_w)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const long long row = i / target_w, plane = row / target_h;
        const int h = row % target_h, w = i % target_w;
        const bool inside = h < source_h && w < source_w;
        target[i] = inside ? source[(plane * source_h + h) * source_w + w] : ELEMENT{};
    }
}
