"""How to call a server from jax. There is nothing to import from here: a connection takes jax arrays by itself.

::

    import jax
    import deconvd_client

    F = deconvd_client.connect("gpu-host:50051")

    @jax.jit
    def loss(W, x):
        return (F.deconvolution_2d(x, W, stride=2, pad=1) ** 2).sum()

    gW = jax.grad(loss)(W, x)

**Arrays.** Results are jax arrays on the device of x. On the processor, operands are not copied. An array on a card is
given to the server as a cupy array if cupy is installed, else through the host. Arrays on several devices are refused.

**Transformations.** ``jit``, ``grad``, ``vmap``, ``jvp``, ``hessian``, ``scan`` and the others apply to
`deconvolution_2d` and `deconvolution_2d_grad`, in any order and any number of times. Gradients that are not needed are
not computed. Under ``vmap``, one call computes the whole batch: it joins the samples if only x is mapped, the output
channels if only W is, and the groups if both are. Under ``shard_map`` (with ``check_vma=False``) each shard makes its
own call.

**Options.** A compiled function has the options that `Connection.using_config` had set when it was traced, also for its
gradients. jax does not trace it again when options change: put ``with F.using_config(...)`` inside the function.

**Errors.** Arguments are checked while a function is traced, and outside ``jit`` calls raise their own errors. What
fails when a compiled function runs is an error of jax's with the text of ours: a ``jax.errors.JaxRuntimeError``, or, in
calls of a function that ran before, a ValueError.

**Life.** Compiled functions keep their connection. Close it to end its calls. ``jax.export`` cannot export them.
"""

__all__: list[str] = []
