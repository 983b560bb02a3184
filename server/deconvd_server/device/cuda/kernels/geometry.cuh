// What columns.py and depthwise.py pass as their Geometry: the extents of a problem, as in deconvd.problem.

struct Axis {
    int image, kernel, output;  // extents of x, W and y along it
    int stride, pad, dilate;
    int tap_step;  // taps this far apart reach an output pixel from whole input pixels: stride / gcd(stride, dilate)
};

struct Geometry {
    int samples, input_channels, output_channels, groups;  // channels of x and y, all groups together
    Axis h, w;
};

// Returns the first tap that reaches an output pixel from a whole input pixel, or tap_step if none does.
__device__ __forceinline__ int first_tap(const Axis &axis, int output)
{
    const long long reach = (long long)output + axis.pad;
    if (axis.dilate == 1) return reach % axis.stride;
    for (int tap = 0; tap < axis.tap_step; ++tap)
        if ((reach - (long long)axis.dilate * tap) % axis.stride == 0) return tap;
    return axis.kernel;
}
