"""SimPO written down once more, in plain PyTorch on transformers models: what the trainer must equal.

The formulas are those of docs/simpo.md; nothing here is shared with the trainer. Everything runs in
the dtype of the model, so that a model loaded by `load_model(..., torch.float64)` gives true fp64
numbers: transformers computes norms, softmax and rotary angles in fp32 whatever the model's dtype
is, so for fp64 these three are replaced by versions without a cast.

Batches are lists of pairs {"chosen": ids, "rejected": ids, "chosen_prompt_length": n, ...}. They are
padded, run as chosen rows then rejected rows, and reduced over the whole global batch.
"""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_scheduler
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import text


@dataclasses.dataclass(frozen=True)
class Loss:
    loss_type: str = "sigmoid"
    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class Training:
    steps: int = 20
    micro_batch: int = 4
    accumulation: int = 2
    learning_rate: float = 5e-4
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    @property
    def global_batch(self):
        return self.micro_batch * self.accumulation


# ------------------------------------------------------------------------------------- fp64 models
def _plain_norm(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _plain_gemma_norm(self, x):
    return (1.0 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@dynamic_rope_update
def _plain_rotary(self, x, position_ids):
    # The frequencies keep their fp32 values; angles and their functions do not.
    angles = position_ids[:, :, None].to(x.dtype) * self.inv_freq[None, None, :].to(x.dtype)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos() * self.attention_scaling, both.sin() * self.attention_scaling


def _plain_attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, sliding_window=None, softcap=None, **_
):
    key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
    value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = query.shape[2]
    hidden = torch.ones((length, length), dtype=torch.bool).triu(1)
    if sliding_window is not None:
        hidden |= torch.ones((length, length), dtype=torch.bool).tril(-sliding_window)
    probabilities = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register("plain", _plain_attention)

FAMILIES = {
    "Gemma": (modeling_gemma, _plain_gemma_norm),
    "Gemma2": (modeling_gemma2, _plain_gemma_norm),
    "Llama": (modeling_llama, _plain_norm),
    "Mistral": (modeling_mistral, _plain_norm),
    "Olmo2": (modeling_olmo2, _plain_norm),
    "Phi3": (modeling_phi3, _plain_norm),
    "Qwen2": (modeling_qwen2, _plain_norm),
    "Qwen3": (modeling_qwen3, _plain_norm),
}


@contextlib.contextmanager
def without_casts(dtype):
    """Norms and rotary angles in the model's own dtype; nothing changes for fp32."""
    if dtype == torch.float32:
        yield
        return
    before = []
    for family, (module, norm) in FAMILIES.items():
        for name, forward in ((f"{family}RMSNorm", norm), (f"{family}RotaryEmbedding", _plain_rotary)):
            place = getattr(module, name)
            before.append((place, place.forward))
            place.forward = forward
    try:
        yield
    finally:
        for place, forward in before:
            place.forward = forward


def load_model(path, dtype):
    # Right padding comes after every real token, so the causal mask alone hides it and "plain"
    # needs no other.
    attention = "eager" if dtype == torch.float32 else "plain"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    return model.to(dtype).train()


# ------------------------------------------------------------------------------------------- loss
def collate(pairs):
    rows = [(p["chosen"], p["chosen_prompt_length"]) for p in pairs]
    rows += [(p["rejected"], p["rejected_prompt_length"]) for p in pairs]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    real = torch.zeros_like(ids)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        real[i, : len(tokens)] = 1
        scored[i, prompt : len(tokens)] = True
    return ids, real, scored


def logits_of(model, ids, real):
    """Of padded rows. Where rotary angles depend on the length, each row goes through a fresh model alone: in a padded
    batch transformers would give every row the angles of the longest, and keep those of earlier batches."""
    if model.config.rope_parameters["rope_type"] not in ("dynamic", "longrope"):
        return model(ids, attention_mask=real, use_cache=False).logits
    rows, rotary = [], model.model.rotary_emb
    for row, length in zip(ids, real.sum(-1).tolist()):
        rotary.inv_freq = rotary.original_inv_freq.clone()
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        rows.append(F.pad(model(row[None, :length], use_cache=False).logits[0], (0, 0, 0, ids.shape[1] - length)))
    return torch.stack(rows)


def score(model, pairs, mutant=""):
    """Per row, chosen rows first: sum of log-probabilities, scored tokens, sum of mean logits."""
    ids, real, scored = collate(pairs)
    logits = logits_of(model, ids, real)
    if mutant == "shifted_label":
        predicted, mask = logits[:, 1:], scored[:, 1:]  # scores a token with the logits that follow it
    else:
        predicted, mask = logits[:, :-1], scored[:, 1:]
    logps = predicted.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * mask).sum(-1), mask.sum(-1), (predicted.detach().mean(-1) * mask).sum(-1)


def pair_losses(chosen, rejected, loss):
    z = loss.beta * (chosen - rejected - loss.gamma_beta_ratio)
    if loss.loss_type == "hinge":
        return torch.relu(1 - z)
    return -(1 - loss.label_smoothing) * F.logsigmoid(z) - loss.label_smoothing * F.logsigmoid(-z)


def chosen_tokens(pairs):
    return sum(len(p["chosen"]) - p["chosen_prompt_length"] for p in pairs)


class Sums:
    """What adds up over micro-batches, and the metrics of the whole."""

    def __init__(self):
        self.pairs = 0
        self.sums = {}
        self.smallest_margin = math.inf

    def add(self, losses, sums, counts, mean_logits):
        n = len(losses)
        s = (sums / counts).detach()
        margins = s[:n] - s[n:]
        self.pairs += n
        self.smallest_margin = min(self.smallest_margin, margins.abs().min().item())
        parts = {
            "loss": losses.detach(),
            "chosen": s[:n],
            "rejected": s[n:],
            "accuracy": (margins > 0).to(s.dtype),
            "nll": -sums[:n].detach(),
            "tokens_chosen": counts[:n],
            "tokens_rejected": counts[n:],
            "logits_chosen": mean_logits[:n],
            "logits_rejected": mean_logits[n:],
        }
        for name, values in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + values.sum().item()

    def metrics(self, loss):
        mean = {k: v / self.pairs for k, v in self.sums.items()}
        sft = self.sums["nll"] / self.sums["tokens_chosen"]
        return {
            "loss": mean["loss"] + loss.sft_weight * sft,
            "rewards/chosen": loss.beta * mean["chosen"],
            "rewards/rejected": loss.beta * mean["rejected"],
            "rewards/accuracies": mean["accuracy"],
            "rewards/margins": loss.beta * (mean["chosen"] - mean["rejected"]),
            "logps/chosen": mean["chosen"],
            "logps/rejected": mean["rejected"],
            "logits/chosen": self.sums["logits_chosen"] / self.sums["tokens_chosen"],
            "logits/rejected": self.sums["logits_rejected"] / self.sums["tokens_rejected"],
            "sft_loss": sft,
            "nll_loss": sft,
            "lengths/chosen": mean["tokens_chosen"],
            "lengths/rejected": mean["tokens_rejected"],
        }


def forward_backward(model, pairs, loss, global_pairs, global_chosen_tokens, sums, mutant="", backward=True):
    """Adds one micro-batch's gradients and sums."""
    n = len(pairs)
    logps, counts, mean_logits = score(model, pairs, mutant)
    s = logps if mutant == "no_length_mean" else logps / counts
    losses = pair_losses(s[:n], s[n:], loss)
    if backward:
        total = losses.sum() / global_pairs - loss.sft_weight * logps[:n].sum() / global_chosen_tokens
        total.backward()
    sums.add(losses, logps, counts, mean_logits)


def evaluate(model, pairs, loss):
    sums = Sums()
    with torch.no_grad():
        forward_backward(model, pairs, loss, 1, 1, sums, backward=False)
    return sums.metrics(loss)


# --------------------------------------------------------------------------------------- training
def decays(name, tensor):
    return tensor.ndim > 1  # not biases and norms


class PlainAdamW:
    """AdamW as its paper has it, one line per equation, with the mistakes that the tests must find."""

    def __init__(self, model, weight_decay, mutant):
        self.parameters = dict(model.named_parameters())
        self.weight_decay, self.mutant = weight_decay, mutant
        self.m = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.v = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.t = 0

    @torch.no_grad()
    def step(self, rate):
        self.t += 1
        t = self.t + 1 if self.mutant == "bias_correction" else self.t
        for name, p in self.parameters.items():
            m, v = self.m[name], self.v[name]
            if decays(name, p) or self.mutant == "decay_on_norms":
                p.mul_(1 - rate * self.weight_decay)
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            p.sub_(rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


class TorchAdamW:
    """torch's own AdamW with transformers' own scheduler."""

    def __init__(self, model, training):
        named = list(model.named_parameters())
        groups = [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": training.weight_decay},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.999), eps=1e-8)
        self.scheduler = get_scheduler(
            training.lr_scheduler_type,
            self.optimizer,
            num_training_steps=training.steps,
            num_warmup_steps=math.ceil(training.warmup_ratio * training.steps),
        )

    def rate(self):
        return self.optimizer.param_groups[0]["lr"]

    def step(self):
        self.optimizer.step()
        self.scheduler.step()


def batches_of(pairs, training):
    """The global batches of each step, in the order of the rows, the last of an epoch partial."""
    size = training.global_batch
    epoch = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [epoch[step % len(epoch)] for step in range(training.steps)]


def train(model, pairs, loss, training, mutant=""):
    """Metrics of every step. With a mutant, one thing is wrong on purpose."""
    correct = TorchAdamW(model, training)
    rates = []
    for _ in range(training.steps + 1):
        rates.append(correct.rate())
        correct.optimizer.step()  # without gradients: only so that the scheduler does not warn
        correct.scheduler.step()
    optimizer = PlainAdamW(model, training.weight_decay, mutant) if mutant else TorchAdamW(model, training)
    log = []
    for step, batch in enumerate(batches_of(pairs, training)):
        model.zero_grad()
        sums = Sums()
        micro_batch = math.ceil(len(batch) / training.accumulation)
        for begin in range(0, len(batch), micro_batch):
            forward_backward(
                model, batch[begin : begin + micro_batch], loss, len(batch), chosen_tokens(batch), sums, mutant
            )
        limit = math.inf if mutant == "no_clipping" else training.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
        rate = rates[step + 1] if mutant == "schedule_one_ahead" else rates[step]
        if mutant:
            optimizer.step(rate)
        else:
            assert optimizer.rate() == rate
            optimizer.step()
        log.append(
            {**sums.metrics(loss), "grad_norm": norm, "learning_rate": rate, "smallest_margin": sums.smallest_margin}
        )
    return log


# ---------------------------------------------------------------- the same steps on real tokenizers
# What compare_princeton.py and compare_trl.py both train. Each tokenizer with its family of models: one with the
# paper's own template, one whose template knows a system message, one without BOS.
REAL_FAMILIES = {"mistral_nemo": "mistral", "llama3": "llama", "qwen2_5": "qwen2"}
REAL_MAX_LENGTH = 130
REAL_TRAINING = Training(micro_batch=4, accumulation=1, learning_rate=2e-3)


def real_rows():
    """Fewer than the steps take, so that they come again; some are too long to leave anything to train on."""
    return text.awkward_conversations(43, 60, True)


def make_real_model(packages, name, folder):
    """A real tokenizer beside a small model of its family, of random weights, with its whole vocabulary."""
    text.copy_tokenizer(packages, name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.for_model(
        REAL_FAMILIES[name], vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tokenizer


def largest_differences(ours, theirs, keys):
    """Of each metric over all steps, in units of max(1, |theirs|). A number that is none differs without bound."""
    worst = dict.fromkeys(keys, 0.0)
    for mine, want in zip(ours, theirs, strict=True):
        for key in keys:
            difference = abs(mine[key] - want[key]) / max(1.0, abs(want[key]))
            worst[key] = max(worst[key], math.inf if math.isnan(difference) else difference)
    return worst


def loss_fall(steps):
    """How far the loss fell below the first step's: without learning, nothing is compared."""
    return steps[0]["loss"] - min(step["loss"] for step in steps)
