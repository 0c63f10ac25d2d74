"""What a forward pass leaves for the backward pass, on tensors with shapes and no numbers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from duet_unlearn.distill.config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, TrainingArguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """What the batches of the first epoch's first steps look like."""

    rows: int
    tokens: int
    scored: int
    """Positions whose logits are compared, in the batch that has most."""
    longest_prompt: int


def activations(
    model: "PreTrainedModel", config: RunConfig, args: "TrainingArguments", lengths: Lengths
) -> int:
    """Return the bytes that the largest forward pass leaves for the backward pass.

    With bf16 arithmetic the weights' casts are among them.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    adapted: Any = model
    body = adapted.get_base_model() if hasattr(model, "peft_config") else adapted
    precision = torch.float16 if args.fp16 else torch.bfloat16
    kept: dict[int, Tensor] = {}

    def keep(tensor: "Tensor") -> "Tensor":
        if not isinstance(tensor, torch.nn.Parameter):
            # Two views of one storage are one.
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        # Tensors of the CPU, without numbers by the mode that is on, in place of meta tensors.
        adapted.to_empty(device="cpu")
        body.tie_weights()
        model.train()
        ids = torch.zeros(lengths.rows, lengths.tokens, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=precision, enabled=args.bf16 or args.fp16),
        ):
            # The result holds the graph, and with it what was kept.
            result = body.base_model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            )
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        of_body = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
        del result
    if config.gradient_checkpointing:
        layers = model.config.get_text_config().num_hidden_layers
        inputs = ids.numel() * model.config.get_text_config().hidden_size * 4
        of_body = of_body // layers + layers * inputs
    return of_body + _head_bytes(model, config, lengths)


def _head_bytes(model: "PreTrainedModel", config: RunConfig, lengths: Lengths) -> int:
    """Return what one piece of the head's logits takes, with its gradient, in float32."""
    from duet_unlearn.distill.losses import Loss
    from duet_unlearn.distill.model.sparse_head import PIECE_NUMBERS

    text = model.config.get_text_config()
    tail = config.objective != "duet" or Loss(name=config.loss).tail or bool(config.ce_weight)
    width = text.vocab_size if tail else int(config.top_k or 1) * text.hidden_size
    return 8 * min(PIECE_NUMBERS, lengths.scored * int(width))
