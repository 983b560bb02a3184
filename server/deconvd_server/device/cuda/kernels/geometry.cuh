// Which taps reach an output pixel. Axis and KernelGeometry are generated from structs.py.

// The first tap that reaches an output pixel from an input pixel, and that pixel, which may be outside the image.
// Without such a tap, tap >= kernel.
template <typename Integer> struct FirstTap {
    Integer tap, pixel;

    __device__ __forceinline__ FirstTap(const Axis &axis, Integer output)
    {
        const Integer reach = output + axis.pad;
        tap = axis.dilate == 1 ? reach % axis.stride : 0;
        while (tap < axis.kernel && (reach - tap * axis.dilate) % axis.stride != 0)
            if (++tap == axis.tap_step) tap = axis.kernel;  // taps repeat after tap_step: no tap reaches it
        pixel = tap < axis.kernel ? (reach - tap * axis.dilate) / axis.stride : -1;
    }
};
