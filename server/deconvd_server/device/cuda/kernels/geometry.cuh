// What columns.py and depthwise.py pass as their Geometry: the extents of a problem, as in deconvd.model.problem.

struct Axis {
    int image, kernel, output;  // extents of x, W and y along it
    int stride, pad, dilate;
    // Taps `tap_step` apart reach an output pixel from whole input pixels, which are `image_step` apart.
    int tap_step, image_step;  // stride and dilate, over their greatest common divisor
};

struct Geometry {
    int samples, input_channels, output_channels, groups;  // channels of x and y, all groups together
    Axis h, w;
};

// The first tap that reaches an output pixel from a whole input pixel, and that pixel; it may lie outside the image.
template <typename Integer> struct FirstTap {
    Integer tap, pixel;

    __device__ __forceinline__ FirstTap(const Axis &axis, Integer output)
    {
        const Integer reach = output + axis.pad;
        tap = axis.dilate == 1 ? reach % axis.stride : 0;
        while (tap < axis.kernel && (reach - tap * axis.dilate) % axis.stride != 0)
            if (++tap == axis.tap_step) tap = axis.kernel;  // there is none
        pixel = tap < axis.kernel ? (reach - tap * axis.dilate) / axis.stride : -1;
    }
};
