"""Stand-in for SGLang's CPU kernels, in plain torch: test use only.

PyPI carries the CUDA build of `sgl_kernel`; the CPU build must be compiled and wants AVX-512.
Here is what SGLang 0.5.23 calls when it serves text with a chain draft (top-k 1): attention over
its token pool, and the bookkeeping of a verify step. A tree of drafts, sinks and cross attention
are refused by name.

Legend of shapes: B requests, N tokens of a verify step (the known one and N - 1 drafted), P slots
of a row of the pool. `req_to_token` [requests, P] holds, for each position of a request, its slot
in the KV cache.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

__version__ = "0+stand.in"


# --- slots ------------------------------------------------------------------------------------


def assign_req_to_token_pool_cpu(
    requests: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, width: int
) -> None:
    """Write the slots, request after request, into positions start..end of each."""
    taken = 0
    for row, first, last in zip(requests.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[row, first:last] = slots[taken : taken + last - first].to(req_to_token.dtype)
        taken += last - first


def assign_extend_cache_locs_cpu(
    requests: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, width: int
) -> None:
    """Read what `assign_req_to_token_pool_cpu` writes."""
    taken = 0
    for row, first, last in zip(requests.tolist(), start.tolist(), end.tolist(), strict=True):
        slots[taken : taken + last - first] = req_to_token[row, first:last].to(slots.dtype)
        taken += last - first


def assign_draft_cache_locs_contiguous_cpu(
    requests: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    width: int,
    topk: int,
    num_steps: int,
) -> None:
    """The topk * num_steps slots behind each request's tokens."""
    count = topk * num_steps
    assign_extend_cache_locs_cpu(requests, req_to_token, seq_lens, seq_lens + count, slots, width)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, requests: Tensor, seq_lens: Tensor, topk: int, num_steps: int, width: int
) -> Tensor:
    """The draft's own pool, [B, P]: a chain's tokens lie behind those of its request."""
    _chain_only("build_draft_decode_metadata_cpu", topk)
    return req_to_token[requests.long(), :width].clone()


def copy_all_layer_kv_cache_cpu(
    pointers: Tensor, row_bytes: Tensor, to_slots: Tensor, from_slots: Tensor
) -> None:
    """Copy rows of every layer's buffer, given by its address and the bytes of a row. All are
    read first.
    """
    to_list, from_list = to_slots.tolist(), from_slots.tolist()
    for base, size in zip(pointers.tolist(), row_bytes.tolist(), strict=True):
        rows = [ctypes.string_at(base + slot * size, size) for slot in from_list]
        for slot, row in zip(to_list, rows, strict=True):
            ctypes.memmove(base + slot * size, row, size)


# --- a verify step ----------------------------------------------------------------------------


def build_tree_kernel_efficient_cpu(
    parents: Tensor,
    selected: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    index: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    topk: int,
    num_steps: int,
    num_tokens: int,
    mask_mode: int,
) -> None:
    """Links of a chain: node i of request b is row b N + i, its child is i + 1, the last has none.

    tree_mask stays as it is: with top-k 1 SGLang asks for causal attention and does not pass it on.
    """
    _chain_only("build_tree_kernel_efficient_cpu", topk)
    nodes = torch.arange(num_tokens)
    rows = torch.arange(len(seq_lens))[:, None] * num_tokens + nodes
    child = torch.where(nodes + 1 < num_tokens, nodes + 1, -1)
    index.copy_(rows.view_as(index))
    next_token.copy_(child.expand_as(rows).reshape(next_token.shape))
    next_sibling.fill_(-1)
    positions.copy_((seq_lens[:, None] + nodes).view_as(positions))


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Accept drafted tokens while each is what the target says after the one before it.

    candidates, target_predict: [B, N]; row j of the target judges candidate j + 1. Written are,
    for every request, accept_index [B, S] (rows of the known token and of the accepted ones; the
    rest stays), accept_token_num [B] (drafted tokens accepted) and predicts [B N] (what the
    target says at those rows).
    """
    requests, num_tokens = candidates.shape
    said = target_predict.view(requests, num_tokens)
    if not bool((retrive_next_sibling == -1).all()):
        raise NotImplementedError("sgl_kernel stand-in: verify_tree_greedy_cpu wants a chain")
    most = min(num_tokens, accept_index.shape[1]) - 1
    hits = (candidates[:, 1 : most + 1] == said[:, :most]).long()
    accepted = hits.cumprod(1).sum(1)
    accept_token_num.copy_(accepted)
    for b, count in enumerate(accepted.tolist()):
        rows = b * num_tokens + torch.arange(count + 1)
        accept_index[b, : count + 1] = rows.to(accept_index.dtype)
        predicts[rows] = said[b, : count + 1].to(predicts.dtype)


def fill_bonus_tokens_cpu(tokens: Tensor, lengths: Tensor, bonus: Tensor, width: int) -> None:
    """bonus[b]: the last of the lengths[b] accepted tokens in row b of tokens [B, width]."""
    rows = torch.arange(lengths.numel())
    last = tokens.reshape(-1, width)[rows, lengths.reshape(-1).long() - 1]
    bonus[: lengths.numel()] = last.to(bonus.dtype)


def fill_accept_out_cache_loc_cpu(
    accept_index: Tensor, slots: Tensor, accepted_slots: Tensor
) -> None:
    """Slots of the accepted rows, packed to the front; index -1 is no row."""
    rows = accept_index.reshape(-1)
    rows = rows[rows >= 0].long()
    accepted_slots[: len(rows)] = slots[rows].to(accepted_slots.dtype)


def rotate_input_ids_cpu(
    input_ids: Tensor, start: Tensor, lengths: Tensor, fresh: Tensor, select: Tensor | None = None
) -> None:
    """Shift each request's ids left by one, and put its fresh token last, or at row select[b]."""
    for b, (first, length) in enumerate(zip(start.tolist(), lengths.tolist(), strict=True)):
        if length > 0:
            ids = input_ids[first : first + length]
            ids[:-1] = ids[1:].clone()
            input_ids[first + length - 1 if select is None else int(select[b])] = fresh.view(-1)[b]


def _chain_only(name: str, topk: int) -> None:
    if topk != 1:
        raise NotImplementedError(f"sgl_kernel stand-in: {name} wants top-k 1, a chain, got {topk}")


# --- attention --------------------------------------------------------------------------------


def extend_attention_cpu(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: Tensor,
    requests: Tensor,
    seq_lens: Tensor,
    extend_lens: Tensor,
    extend_start: Tensor,
    max_extend: int,
    scaling: float,
    logit_cap: float,
    is_cross: bool,
    window: int,
    encoder_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    is_causal: bool = True,
) -> None:
    """The last extend_lens[b] tokens of each request over all its seq_lens[b], whose keys are
    cached.

    q, out: [sum of extend_lens, heads, D]. window: keys that a query sees, itself included; 0 for
    all.
    """
    _plain_only("extend_attention_cpu", k_scale, v_scale, logit_cap, is_cross, sinks)
    if tree_mask is not None:
        raise NotImplementedError("sgl_kernel stand-in: extend_attention_cpu wants no tree mask")
    spans = zip(seq_lens.tolist(), extend_lens.tolist(), extend_start.tolist(), strict=True)
    for row, (length, fresh, first) in zip(requests.tolist(), spans, strict=True):
        slots = req_to_token[row, :length].long()
        query, key = torch.arange(length - fresh, length)[:, None], torch.arange(length)
        seen = key <= query if is_causal else torch.ones(fresh, length, dtype=torch.bool)
        if window > 0:
            seen = seen & (key > query - window)
        rows = slice(first, first + fresh)
        out[rows] = _attend(q[rows], k_cache[slots], v_cache[slots], seen, scaling).to(out.dtype)


def decode_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: float,
    v_scale: float,
    out: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    slots: Tensor,
    scratch: Tensor,
    req_to_token: Tensor,
    requests: Tensor,
    seq_lens: Tensor,
    scaling: float,
    logit_cap: float,
    is_cross: bool = False,
    window: int = 0,
    encoder_lens: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """One token a request, whose key and value are cached first if they are given. q, out: [B,
    heads, D].
    """
    _plain_only("decode_attention_cpu", k_scale, v_scale, logit_cap, is_cross, sinks)
    if k is not None and v is not None:
        k_cache[slots.long()] = k.view(-1, *k_cache.shape[1:]).to(k_cache.dtype)
        v_cache[slots.long()] = v.view(-1, *v_cache.shape[1:]).to(v_cache.dtype)
    for b, (row, length) in enumerate(zip(requests.tolist(), seq_lens.tolist(), strict=True)):
        first = max(0, length - window) if window > 0 else 0
        seen = req_to_token[row, first:length].long()
        out[b] = _attend(q[b : b + 1], k_cache[seen], v_cache[seen], None, scaling)[0].to(out.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scaling: float) -> Tensor:
    """Softmax attention in float32, [n, heads, D]. q: [n, heads, D], k and v: [m, kv heads, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scaling
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def _plain_only(
    name: str, k_scale: float, v_scale: float, cap: float, is_cross: bool, sinks: Tensor | None
) -> None:
    if (k_scale, v_scale) != (1.0, 1.0) or cap > 0 or is_cross or sinks is not None:
        raise NotImplementedError(
            f"sgl_kernel stand-in: {name} wants no scales, logit cap, cross attention or sinks"
        )


# SGLang reads these two from torch.ops. They are put there as plain functions: registering them
# as operators would make SGLang believe in more of the package than is here.
torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu
torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu


def __getattr__(name: str) -> object:
    """Anything else can be imported, as SGLang does at module level, and fails when called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel stand-in: {name} is not in it")

    return missing
