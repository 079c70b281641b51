"""How many numbers a layer holds for one sequence, counted from budgets, ranks and sizes of scores alone."""


def numbers_held(budgets, ranks, score_sizes, head_dim):
    """Each argument but the last has one number for each KV head; a head has one slot more than its budget, which is free."""
    slots = [budget + 1 for budget in budgets]
    return {
        "entries": sum(slots) * 2 * head_dim,
        "low_rank": sum(ranks) * (head_dim + 1),
        "bookkeeping": sum(slot * (1 + size) for slot, size in zip(slots, score_sizes, strict=True)),  # a position and a score
    }
