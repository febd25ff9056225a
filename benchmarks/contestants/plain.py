"""The plain packed loop: what a careful engineer writes in an afternoon, with no framework around it.

Rows are packed without padding, attention runs document by document, the vocabulary head sees trained tokens only, AdamW
is the fused one. python -m contestants.plain SETTING.json
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from contestants.setting import IGNORED, NUM_THREADS, Setting, StepLog, tokenize

Sample = tuple[Tensor, Tensor]  # ids, labels

MICRO_BATCH_TOKENS = 4096
HEAD_CHUNK_TOKENS = 512


def attend_per_document(module, query, key, value, attention_mask, scaling, lengths, **_):
    """Causal attention within each document of a packed row; (1, heads, T, width) in, (1, T, heads, width) out."""
    documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    attended = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in documents
    ]
    return torch.cat(attended, 2).transpose(1, 2), None


class HeadLoss(torch.autograd.Function):
    """Cross-entropy summed over rows of `hidden`; makes its gradients in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, num_tokens):
        hidden_grad, weight_grad, loss = torch.empty_like(hidden), torch.zeros_like(weight), hidden.new_zeros(())
        for start in range(0, len(targets), HEAD_CHUNK_TOKENS):
            chunk = slice(start, start + HEAD_CHUNK_TOKENS)
            logits, target = hidden[chunk] @ weight.T, targets[chunk, None]
            log_total = logits.logsumexp(-1, keepdim=True)
            loss += (log_total - logits.gather(1, target)).sum()
            grad = logits.sub_(log_total).exp_()
            grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand_as(target)).div_(num_tokens)
            torch.mm(grad, weight, out=hidden_grad[chunk])
            weight_grad.addmm_(grad.T, hidden[chunk])
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss / num_tokens

    @staticmethod
    def backward(ctx, loss_grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * loss_grad, weight_grad * loss_grad, None, None


def pack(batch: list[Sample]) -> list[list[Sample]]:
    """Micro-batches of nearly equal size, none above the budget."""
    num_tokens = sum(len(ids) for ids, _ in batch)
    share = num_tokens / -(-num_tokens // MICRO_BATCH_TOKENS)
    micro_batches: list[list[Sample]] = [[]]
    filled = 0
    for sample in batch:
        if filled >= share * len(micro_batches):
            micro_batches.append([])
        micro_batches[-1].append(sample)
        filled += len(sample[0])
    return micro_batches


def forward_backward(model, samples: list[Sample], num_trained: int) -> Tensor:
    lengths = [len(ids) for ids, _ in samples]
    ids, labels = (torch.cat(parts) for parts in zip(*samples, strict=True))
    positions = torch.cat([torch.arange(length) for length in lengths])
    trained = (labels != IGNORED).nonzero()[:, 0]
    output = model.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, lengths=lengths)
    hidden = output.last_hidden_state[0, trained - 1]
    loss = HeadLoss.apply(hidden, model.lm_head.weight, labels[trained], num_trained)
    loss.backward()
    return loss.detach()


def main(setting: Setting) -> None:
    torch.set_num_threads(NUM_THREADS)
    AttentionInterface.register("per_document", attend_per_document)
    model = AutoModelForCausalLM.from_pretrained(setting.model, attn_implementation="per_document", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    samples = [
        tuple(torch.tensor(part) for part in tokenize(tokenizer, row["messages"])) for row in setting.conversations()
    ]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": setting.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=setting.lr, betas=setting.betas, eps=setting.eps, fused=True,
    )  # fmt: skip
    log, model = StepLog(setting), model.train()
    starts = [start for _ in range(setting.num_epochs) for start in range(0, len(samples), setting.batch_rows)]
    for step, start in enumerate(starts, 1):
        batch = samples[start : start + setting.batch_rows]
        num_trained = sum(int((labels != IGNORED).sum()) for _, labels in batch)
        loss = sum(forward_backward(model, micro_batch, num_trained) for micro_batch in pack(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), setting.clip_grad, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.write(step, float(loss), sum(len(ids) for ids, _ in batch))


if __name__ == "__main__":
    main(Setting.read(sys.argv[1]))
