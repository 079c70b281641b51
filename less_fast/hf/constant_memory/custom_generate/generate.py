"""`generate` in constant memory: transformers copies this file and calls it for `model.generate(..., custom_generate=FOLDER)`."""

try:  # so that transformers goes on to requirements.txt and says the package's name
    from less_fast import LessCache, LessError, LessKernels, Policy
    from less_fast.setting import policy_named
except ImportError:
    pass


def generate(
    model,
    policy: "str | Policy | None" = None,
    budget: int | None = None,
    kernels: "str | LessKernels | None" = None,
    budgets=None,
    chunk: int | None = None,
    token_kinds=None,
    context: int | None = None,
    int8: bool = False,
    past_key_values=None,
    **kwargs,
):
    """What `model.generate` returns, through a new LessCache.

    budget: tokens that each KV head keeps on average, 64 unless it or a policy says otherwise. policy: a policy, or a name in
        `less_fast.setting.POLICIES`. kernels: a folder or a repository of the hub, or LessKernels.
    Without them it is the best there is for this model: see `LessCache.for_model`, as for budgets, chunk, token_kinds, context
    and int8. Raises LessError if these are none, do not go together, or the model cannot be served.
    """
    if past_key_values is not None:
        raise LessError("custom_generate makes a cache of its own: leave past_key_values out, or custom_generate")
    if isinstance(policy, str):
        policy, budget = policy_named(policy, 64 if budget is None else budget), None
    elif policy is None and budget is None:
        budget = 64
    if isinstance(kernels, str):
        kernels = LessKernels.from_pretrained(kernels).to(model.device)
    more = dict(context=context, int8=int8, budget=budget)
    cache = LessCache.for_model(model, policy, kernels, budgets, chunk, token_kinds, **more)
    return type(model).generate(model, past_key_values=cache, **kwargs)
