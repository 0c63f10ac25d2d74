"""The lean head against the plain way: the same scores, losses and gradients."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from duet_unlearn.distill.losses import Loss, row_means, scores_of
from duet_unlearn.distill.model import sparse_head as head
from duet_unlearn.distill.model.sparse_head import CachedRows, ScoresWithTail, StudentScores

VOCABULARY, TOP_K, HIDDEN = 211, 5, 32
LENGTHS = ((3, 4), (7, 1), (5, 2))  # prompt and response of each row
LOSS_NAMES = ("huber", "mse", "kl", "kl-tail", "reverse-kl", "jsd")

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def llama(**settings) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0, sliding_window=32)
    return Gemma2ForCausalLM(config)


def granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))


def biased() -> nn.Module:
    model = llama(tie_word_embeddings=False)
    model.lm_head = nn.Linear(HIDDEN, VOCABULARY)
    return model


def adapted(*, head_too: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj"] + (["lm_head"] if head_too else [])
    model = get_peft_model(
        llama(tie_word_embeddings=False), LoraConfig(r=2, target_modules=targets)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide all other gradients
            nn.init.normal_(parameter)
    return model


LEAN: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: llama(tie_word_embeddings=True),
    "untied": lambda: llama(tie_word_embeddings=False),
    "gpt2": gpt2,
    "lora": adapted,
}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "soft cap": gemma2,
    "scale": granite,
    "bias": biased,
    "lora on the head": lambda: adapted(head_too=True),
}


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Three rows whose responses end after 4, 1 and 2 positions, as `collate` lays them out."""
    generator = torch.Generator().manual_seed(3)
    prompt, positions = max(p for p, _ in LENGTHS), max(r for _, r in LENGTHS)
    rows, columns = len(LENGTHS), prompt + positions - 1
    attention_mask = torch.zeros(rows, columns, dtype=torch.int64)
    position_mask = torch.zeros(rows, positions, dtype=torch.bool)
    for row, (prompt_length, response_length) in enumerate(LENGTHS):
        attention_mask[row, prompt - prompt_length : prompt + response_length - 1] = 1
        position_mask[row, :response_length] = True
    ids = torch.rand(rows, positions, VOCABULARY, generator=generator).argsort(-1)[..., :TOP_K]
    return {
        "input_ids": torch.randint(3, VOCABULARY, (rows, columns), generator=generator),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "position_mask": position_mask,
        "token_ids": torch.where(position_mask.unsqueeze(-1), ids, 0),
        "teacher_logits": 2 * torch.randn(rows, positions, TOP_K, generator=generator).double(),
        "teacher_logsumexp": torch.full((rows, positions), 6.0, dtype=torch.float64),
    }


def loss_and_gradients(
    model: nn.Module, wrapped: nn.Module, batch: dict[str, Tensor], name: str, *, lean: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    loss = Loss(name=name)
    scores = StudentScores(model, tail=loss.tail, lean=lean)(wrapped, batch)
    losses = loss(scores, batch["teacher_logits"], batch["teacher_logsumexp"])
    rows = row_means(losses, batch["position_mask"])
    model.zero_grad()
    (rows * torch.tensor([0.5, 0.2, 0.3])).sum().backward()
    named = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return rows.detach(), named


def whole(gradient: Tensor) -> Tensor:
    """Return a copy of a gradient, gathered where FSDP has split it."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()


def assert_same(one, other, **tolerance) -> None:
    torch.testing.assert_close(one[0], other[0], **tolerance)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], msg=name, **tolerance)
    assert any(gradient.abs().max() > 1e-3 for gradient in one[1].values())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two positions with the whole vocabulary, one with cached rows alone."""
    monkeypatch.setattr(head, "PIECE_NUMBERS", 2 * VOCABULARY)


def widths(model: nn.Module, run: Callable[[], object]) -> list[int]:
    """Return how many numbers a position each pass of the head gave."""
    found: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: found.append(output.shape[-1])
    )
    try:
        run()
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("make", LEAN.values(), ids=LEAN.keys())
def test_lean_equals_plain_with_gradients(make, name, batch, small_pieces):
    torch.manual_seed(0)
    model = make().double()
    plain = loss_and_gradients(model, model, batch, name, lean=False)
    result = []
    run = lambda: result.append(loss_and_gradients(model, model, batch, name, lean=True))  # noqa: E731
    assert set(widths(model, run)) == {TOP_K + Loss(name=name).tail}
    assert_same(result[0], plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["huber", "kl-tail"])
@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_a_head_that_is_not_plain_is_left_alone(make, name, batch):
    torch.manual_seed(0)
    model = make().double()
    plain = loss_and_gradients(model, model, batch, name, lean=False)
    result = []
    run = lambda: result.append(loss_and_gradients(model, model, batch, name, lean=True))  # noqa: E731
    assert widths(model, run)[-1] == VOCABULARY
    assert_same(result[0], plain, rtol=1e-9, atol=1e-12)
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_model_that_needs_all_logits_gets_them(batch):
    class Shifted(nn.Module):
        """Adds a number a token to its logits, so K of them do not fit."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()
            self.shift = nn.Parameter(torch.randn(VOCABULARY))

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, input_ids, attention_mask, position_ids, logits_to_keep):
            out = self.inner(input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep)
            out.logits = out.logits + self.shift
            return out

    torch.manual_seed(0)
    model = Shifted().double()
    plain = loss_and_gradients(model, model, batch, "huber", lean=False)
    assert_same(loss_and_gradients(model, model, batch, "huber", lean=True), plain)


def test_trying_the_head_draws_no_random_numbers_and_leaves_no_trace(batch):
    model = llama(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    scores = StudentScores(model, tail=False)
    scores._try(model, batch)
    assert scores._head is model.get_output_embeddings()
    assert scores._merges
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert "forward" not in vars(model.get_output_embeddings())


class LargestOutput(TorchDispatchMode):
    """Remembers the most logits that any operation gave, in rows of V numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        logits = isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == VOCABULARY
        if logits and out.stride(-1) == 1:  # else a view of the transposed weight
            self.rows = max(self.rows, out.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize(("name", "largest"), [("huber", 0), ("jsd", 2)])
def test_no_more_logits_exist_than_a_piece_holds(name, largest, batch, small_pieces):
    model = llama()
    with LargestOutput() as seen:
        loss_and_gradients(model, model, batch, name, lean=True)
    assert seen.rows == largest
    with LargestOutput() as seen:
        loss_and_gradients(model, model, batch, name, lean=False)
    assert seen.rows >= 12


@pytest.fixture
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, sharded])
@pytest.mark.parametrize("name", ["huber", "jsd"])
def test_the_head_is_lean_behind_ddp_and_fsdp(name, wrap, batch, one_process):
    torch.manual_seed(0)
    model = llama().double()
    plain = loss_and_gradients(model, model, batch, name, lean=False)
    wrapped = wrap(model)
    result = []
    run = lambda: result.append(loss_and_gradients(model, wrapped, batch, name, lean=True))  # noqa: E731
    assert set(widths(model, run)) == {TOP_K + Loss(name=name).tail}
    assert_same(result[0], plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["huber", "jsd"])
def test_bfloat16_stays_near_the_plain_way(name, batch):
    torch.manual_seed(0)
    model = llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lean = loss_and_gradients(model, model, batch, name, lean=True)
        plain = loss_and_gradients(model, model, batch, name, lean=False)
    torch.testing.assert_close(lean[0], plain[0], rtol=0.02, atol=0.02)
    for parameter, gradient in lean[1].items():
        distance = (gradient - plain[1][parameter]).norm() / plain[1][parameter].norm()
        assert distance < 0.05, parameter
    half = llama().bfloat16()
    assert StudentScores(half, tail=True)(half, batch).dtype == torch.float32


@pytest.mark.parametrize("function", [CachedRows, ScoresWithTail])
def test_both_ways_pass_gradcheck(function, small_pieces):
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(3, 7).argsort(-1)[:, :3]
    assert torch.autograd.gradcheck(function.apply, (hidden, weight, ids))
    frozen = weight.detach()
    assert torch.autograd.gradcheck(lambda h: function.apply(h, frozen, ids), (hidden,))


def test_all_tokens_cached_leaves_an_empty_tail():
    hidden = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    ids = torch.rand(2, 6).argsort(-1)
    scores = ScoresWithTail.apply(hidden, weight, ids)
    assert scores[:, -1].tolist() == [-math.inf] * 2
    torch.testing.assert_close(scores, scores_of(hidden @ weight.T, ids, tail=True))
    loss = Loss(name="jsd")(scores, torch.randn(2, 6), torch.full((2,), 3.0))
    loss.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()
