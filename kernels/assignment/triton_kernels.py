"""Shortest augmenting paths with dual prices (Jonker & Volgenant 1987; Crouse 2016, which scipy follows).

Agents are served one after the other. Each looks for the cheapest way to a place that is free, on which those who hold
the places between move on by one: Dijkstra's algorithm over reduced costs, cost - price of the place - dual of the
agent, which prices keep from being negative. An agent's dual is not stored: along its place the reduced cost is zero.

All that is known of a place lies in registers, a column of the cost matrix each; the row of an agent is read when it is
reached. Numbers that one place holds are taken out by a sum over all of them, of which the others are zero.
"""

import triton
import triton.language as tl

WORST = tl.constexpr(1e9)  # of costs that are not finite


@triton.jit
def _of(values, here):
    """The value at the one place that is `here`; 0 where none is."""
    return tl.sum(tl.where(here, values, tl.zeros_like(values)), 0)


@triton.jit
def _cost(costs, agent, place, objects, N, turned, asked):
    """Of giving places to an agent, float64; 0 where it is not asked for."""
    cell = tl.where(turned, place % objects * N + agent, agent % objects * N + place)
    cost = tl.load(costs + cell, mask=asked, other=0.0)
    return tl.where(tl.abs(cost) < float("inf"), cost, WORST).to(tl.float64)


@triton.jit(do_not_specialize=["M", "N", "repeats"])
def assignment_kernel(costs, counts, owners, M, N, repeats, BLOCK: tl.constexpr):
    """A program solves one problem.

    costs: [P, M, N] float32. counts: [P] int64. owners: [P, N] int64, the result. BLOCK: a power of two, at least N and
    M * repeats. Objects look for queries; queries look for objects where they are fewer.
    """
    problem = tl.program_id(0).to(tl.int64)
    costs += problem * M * N
    owners += problem * N
    count = tl.load(counts + problem).to(tl.int32)
    rows = count * repeats
    turned = rows > N
    agents = tl.minimum(rows, N)
    place = tl.arange(0, BLOCK)
    real = place < tl.maximum(rows, N)
    objects = tl.maximum(count, 1)

    price = tl.zeros([BLOCK], tl.float64)
    holder = tl.full([BLOCK], -1, tl.int32)
    for agent in range(agents):
        distance = tl.full([BLOCK], float("inf"), tl.float64)
        before = tl.full([BLOCK], -1, tl.int32)  # the place that a place is reached from, -1: the agent itself
        open_ = real
        reached, at = -1, agent
        lowest, dual = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
        searching = agents > 0
        while searching:
            through = lowest + ((_cost(costs, at, place, objects, N, turned, open_) - price) - dual)
            nearer = open_ & (through < distance)
            distance = tl.where(nearer, through, distance)
            before = tl.where(nearer, reached, before)
            lowest = tl.min(tl.where(open_, distance, float("inf")), 0)
            # Of the nearest places a free one, which ends the search; of those the first.
            nearest = open_ & (distance == lowest)
            first = tl.min(tl.where(nearest, tl.where(holder < 0, place, place + BLOCK), 2 * BLOCK), 0)
            searching = first >= BLOCK
            reached = first % BLOCK
            here = place == reached
            at = _of(holder, here)
            open_ = open_ & (place != tl.where(searching, reached, -1))
            if searching:
                dual = _cost(costs, at, reached, objects, N, turned, searching) - _of(price, here)
        price += tl.where(open_, 0.0, distance - lowest)  # what is not real is not open, and its price of no matter
        while reached >= 0:
            previous = _of(before, place == reached)
            mover = tl.where(previous < 0, agent, _of(holder, place == previous))
            holder = tl.where(place == reached, mover, holder)
            reached = previous

    if turned:
        tl.store(owners + holder, (place % objects).to(tl.int64), mask=real & (holder >= 0))
    else:
        tl.store(owners + place, tl.where(holder < 0, -1, holder % objects).to(tl.int64), mask=place < N)
