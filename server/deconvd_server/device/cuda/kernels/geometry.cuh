// How taps meet pixels. Axis and KernelGeometry are generated from structs.py.

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
