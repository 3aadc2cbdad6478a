"""Tokenizer, model and training loop of the demo checkpoint."""

import json
import random
import time
from collections.abc import Iterator
from itertools import islice

import torch
from data import SEED, Example, Questions
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

VOCABULARY = 1024
MAX_POSITIONS = 4096
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CHATS_PER_STEP = 64
POOL_STEPS = 50  # the chats of so many steps are sorted by length, so that batches need little padding

# --- tokenizer --------------------------------------------------------------------------------------------------------


def chatml(system: str | None, turns: list[Example]) -> str:
    """A whole chat as the model sees it; what CHAT_TEMPLATE renders."""
    messages = [("system", system)] if system else []
    for turn in turns:
        messages += [("user", turn.question), ("assistant", turn.answer)]
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)


def train_tokenizer(questions: Questions, chats: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's pre-tokenizer (digits one by one), learnt from training chats only."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    texts: list[str] = []
    for system, turns in questions.chats(SEED, chats):
        for turn in turns:
            texts += ["system\n", system or "", "user\n", turn.question, "assistant\n", turn.answer]
    size = VOCABULARY - len(SPECIALS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"] | {token: size + i for i, token in enumerate(SPECIALS)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"],
        model_max_length=MAX_POSITIONS,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- batches ----------------------------------------------------------------------------------------------------------


def pools(questions: Questions, seed: int) -> Iterator[tuple[list[tuple[str | None, list[Example]]], list[int]]]:
    """Endless (chats of POOL_STEPS steps, order in which their batches are trained)."""
    rng = random.Random(seed)
    while True:
        chats = list(questions.chats(rng.randrange(2**32), CHATS_PER_STEP * POOL_STEPS))
        order = list(range(POOL_STEPS))
        rng.shuffle(order)
        yield chats, order


def answer_spans(ids: list[int], start: int, assistant: int, end: int) -> list[tuple[int, int]]:
    """Where the answers stand in a chat: from behind ``<|im_start|>assistant\\n`` to ``<|im_end|>`` inclusive."""
    heads = [i + 3 for i in range(len(ids) - 3) if ids[i] == start and ids[i + 1] == assistant]
    return [(head, ids.index(end, head) + 1) for head in heads]


def batches(questions: Questions, tokenizer: Qwen2Tokenizer, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (token ids, labels), padded on the right, which causal attention cannot see. -100 but on answers."""
    names = ["<|im_start|>", "<|im_end|>", "assistant", "<|endoftext|>"]
    start, end, assistant, pad = tokenizer.convert_tokens_to_ids(names)
    for chats, order in pools(questions, seed):
        encoded = sorted(tokenizer([chatml(*chat) for chat in chats])["input_ids"], key=len)
        for step in order:
            rows = encoded[step * CHATS_PER_STEP : (step + 1) * CHATS_PER_STEP]
            ids = torch.full((len(rows), max(map(len, rows))), pad)
            labels = torch.full_like(ids, -100)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
                for a, b in answer_spans(row, start, assistant, end):
                    labels[i, a:b] = ids[i, a:b]
            yield ids, labels


# --- model ------------------------------------------------------------------------------------------------------------


def new_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Qwen2 in small: grouped-query attention, QKV bias, tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, use_sliding_window=False, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def train(
    model: Qwen2ForCausalLM, questions: Questions, tokenizer: Qwen2Tokenizer, steps: int, seed: int
) -> tuple[float, float]:
    """Train in float32: Muon for the layers' matrices, AdamW for the rest. Returns the last loss and the seconds."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01)
    adamw = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, min(100, steps // 10))

    def rate(step: int) -> float:  # warm up, stay, then down to zero over the last half
        return min((step + 1) / warmup, 1.0, 2 * (1 - step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in (muon, adamw)]
    model.train()
    began, shown = time.monotonic(), 0.0
    for step, (ids, labels) in enumerate(islice(batches(questions, tokenizer, seed), steps)):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        answers = wanted != -100
        loss = F.cross_entropy(model.lm_head(hidden[answers]), wanted[answers])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip((muon, adamw), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        shown = loss.item() if step == 0 else 0.98 * shown + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}: loss {shown:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    return shown, time.monotonic() - began


# --- measurement ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, questions: list[str], system: str | None, batch: int = 64
) -> list[str]:
    """Greedy answers through transformers' own chat template and generate()."""
    head = [{"role": "system", "content": system}] if system else []
    found: list[str] = []
    tokenizer.padding_side = "left"  # a prompt's last token must be next to the answer's first
    for i in range(0, len(questions), batch):
        chats = [[*head, {"role": "user", "content": question}] for question in questions[i : i + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        found += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found
