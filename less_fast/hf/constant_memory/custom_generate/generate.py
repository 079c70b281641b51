"""`generate` in constant memory: transformers copies this file and calls it for `model.generate(..., custom_generate=FOLDER)`."""

try:  # so that transformers goes on to requirements.txt and says the package's name
    from less_fast import LessCache, LessError, LessKernels, Policy
    from less_fast.setting import policy_named
except ImportError:
    pass


def generate(
    model,
    policy: "str | Policy" = "h2o",
    budget: int | None = None,
    kernels: "str | LessKernels | None" = "shipped",
    budgets=None,
    chunk: int | None = None,
    token_kinds=None,
    context: int | None = None,
    int8: bool = False,
    past_key_values=None,
    **kwargs,
):
    """What `model.generate` returns, through a new LessCache.

    policy: a policy, or a name in `less_fast.setting.POLICIES`. budget: tokens that each KV head keeps; if None, 51 for a name,
        and what it says for a policy.
    kernels: "shipped", those that come with less-kv for this very model; a folder or a repository of the hub; LessKernels; or
        None for the bare policy. budgets, chunk, token_kinds, context, int8: see `LessCache.for_model`.
    Raises LessError if these are none, do not go together, or the model cannot be served.
    """
    if past_key_values is not None:
        raise LessError("custom_generate makes a cache of its own: leave past_key_values out, or custom_generate")
    if isinstance(policy, str):
        policy = policy_named(policy, 51 if budget is None else budget)
    elif budget is not None:
        policy = policy.with_budget(budget)
    if kernels == "shipped":
        kernels = LessKernels.for_model(model)
    elif isinstance(kernels, str):
        kernels = LessKernels.from_pretrained(kernels).to(model.device)
    cache = LessCache.for_model(model, policy, kernels, budgets, chunk, token_kinds, context=context, int8=int8)
    return type(model).generate(model, past_key_values=cache, **kwargs)
