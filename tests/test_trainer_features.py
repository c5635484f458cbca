"""What else of GRPOTrainer stays: images, experts, evaluation, completions, model card, vLLM, bf16, LoRA."""

import copy
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from steps import (
    assert_same_gradient,
    check,
    full_logprobs,
    gradient_of,
    loss_mask,
    reduce,
    reverse_kl,
    sampled,
    student,
    take_step,
)
from tiny import VOCAB_SIZE, make_model, make_prompts, make_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TEACHER = {"hidden_size": 24, "seed": 1}
SAMPLED = {"credit": "policy_gradient", "support": "sampled"}
IMAGE_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def teacher():
    return make_model(**TEACHER).double()


def make_processor():
    """A processor that turns `<image>` into the four patches of a 28 × 28 image."""
    image_processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        image_processor=image_processing.CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=IMAGE_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def make_vlm(hidden_size=16, seed=0):
    text = make_model(hidden_size=hidden_size, vocab_size=VOCAB_SIZE + 1).config
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCAB_SIZE, tie_word_embeddings=False
    )
    model = LlavaForConditionalGeneration(config).double()
    model.generation_config.eos_token_id = list(range(1, 13))
    return model


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
def test_images_reach_the_student_and_the_teacher(tmp_path, credit):
    image = pytest.importorskip("PIL.Image")
    images = [image.new("RGB", (28, 28), (60 * i, 10, 200 - 50 * i)) for i in range(4)]
    rows = {"prompt": [[{"role": "user", "content": text}] for text in ("what", "is", "this", "one")], "image": images}
    seen = []
    step = take_step(
        tmp_path,
        prepare=lambda trainer: trainer.teacher.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
        ),
        model=make_vlm(),
        teacher=make_vlm(hidden_size=24, seed=1),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=8,
        arguments={"train_dataset": Dataset.from_dict(rows), "processing_class": make_processor()},
        **credit,
    )
    for inputs, pixels in zip(step.batches, seen, strict=True):
        assert torch.equal(inputs["pixel_values"], pixels)
        assert (inputs["prompt_ids"] == VOCAB_SIZE).sum() == 8  # four patches for each of two samples
    if not credit:
        check(step, reverse_kl, model=make_vlm(), teacher=make_vlm(hidden_size=24, seed=1))


def make_moe(**kwargs):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,
        **kwargs,
    )
    model = Qwen3MoeForCausalLM(config)
    model.generation_config.eos_token_id = list(range(1, 13))
    return model


@pytest.mark.parametrize("credit", [{}, {"entropy_coef": 0.01}, SAMPLED], ids=["direct", "entropy bonus", "sampled"])
def test_a_mixture_of_experts_keeps_its_balancing_loss(tmp_path, credit):
    plain = take_step(tmp_path / "plain", model=make_moe(), teacher=make_model(**TEACHER), **credit)
    balanced = take_step(
        tmp_path / "balanced", model=make_moe(), teacher=make_model(**TEACHER), router_aux_loss_coef=0.5, **credit
    )
    (inputs,) = balanced.batches
    model = make_moe()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    balance = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert balanced.logs["aux_loss"] == pytest.approx(balance.item(), rel=1e-5)
    assert balanced.loss.item() == pytest.approx(plain.loss.item() + 0.5 * balance.item(), abs=1e-6)
    expected = gradient_of(model, 0.5 * balance)
    difference = {n: g - plain.gradient[n] for n, g in balanced.gradient.items() if n in expected}
    assert_same_gradient(difference, expected, tolerance=1e-4)  # a difference of float32 gradients


def test_evaluation_reports_the_divergence_of_its_own_rollouts(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        arguments={"eval_dataset": make_prompts(4)},
        loss_type="grpo",
    )
    trained, *evaluated = step.batches
    assert len(evaluated) == 2
    model = step.trainer.model.eval()
    values = []
    for inputs in evaluated:
        with torch.no_grad():
            values.append(reverse_kl(full_logprobs(model, inputs), full_logprobs(teacher(), inputs)))
    masks = [loss_mask(inputs) for inputs in evaluated]
    (logs,) = [line for line in step.trainer.state.log_history if "eval_loss" in line]
    losses = [reduce([v], [m], "grpo") for v, m in zip(values, masks, strict=True)]
    mean = sum((v * m).sum() for v, m in zip(values, masks, strict=True)) / sum(m.sum() for m in masks)
    assert logs["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert logs["eval_distill/loss"] == pytest.approx(logs["eval_loss"], rel=1e-5)
    assert logs["eval_distill/reverse_kl"] == pytest.approx(mean.item(), rel=1e-5)
    names = {"forward_kl", "student_entropy", "teacher_entropy", "overlap", "teacher_student_gap"}
    assert {f"eval_distill/{name}" for name in names} <= logs.keys()
    assert not [name for name in logs if "reward" in name or name.startswith("distill")]
    assert not torch.equal(trained["completion_ids"], evaluated[0]["completion_ids"])


def test_completions_are_written_without_a_placeholder_reward(tmp_path, capsys):
    step = take_step(tmp_path, teacher=teacher(), log_completions=True)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(table.columns)[:5] == ["step", "prompt", "completion", "advantage", "token_ids"]
    assert sorted(table["prompt"]) == sorted(step.trainer._logs["prompt"])
    assert len(table) == 4
    assert "Step 1" in capsys.readouterr().out


def test_completions_keep_the_columns_of_real_rewards(tmp_path):
    def length(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    fields = {"num_generations": 2, "log_completions": True}
    take_step(tmp_path, teacher=teacher(), arguments={"reward_funcs": length}, **fields)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(table["length"]) == [float(len(text)) for text in table["completion"]]


def test_the_model_card_cites_on_policy_distillation(tmp_path):
    step = take_step(tmp_path, teacher=teacher())
    step.trainer.create_model_card(model_name="student")
    card = (tmp_path / "README.md").read_text()
    assert "agarwal2024onpolicy" in card
    assert "https://huggingface.co/papers/2306.13649" in card
    assert "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" in card
    assert "trl-opd" in card
    assert "DeepSeekMath" not in card


class FakeVLLM:
    """Samples from a copy of the student that lags behind it, and returns its log-probs, as vLLM does."""

    def __init__(self, model, **kwargs):
        self.model, self.syncs = model, 0
        self.sampler = make_model(seed=7).double()

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler):
        torch.manual_seed(11)
        completions, logprobs = [], []
        for i, prompt in enumerate(prompts):
            ids, scores = list(prompt), []
            for _ in range(3 + i % 3):
                with torch.no_grad():
                    row = self.sampler(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(torch.multinomial(row.exp(), 1)))
                scores.append([float(row[ids[-1]])])
            completions.append(ids[len(prompt) :])
            logprobs.append(scores)
        return prompts, completions, logprobs, None


def test_completions_of_vllm_are_corrected_by_their_importance(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeVLLM)
    step = take_step(
        tmp_path,
        teacher=teacher(),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
    )
    assert step.trainer.vllm_generation.syncs == 1
    (inputs,) = step.batches
    with torch.no_grad():
        pair = [sampled(full_logprobs(m, inputs), inputs) for m in (student(), make_model(seed=7).double())]
    ratio = (pair[0] - pair[1]).exp().clamp(max=2.0)
    assert (ratio < 0.9).any()
    assert (ratio == 2.0).any()
    check(step, lambda s, t: ratio * reverse_kl(s, t))
    assert "sampling/importance_sampling_ratio/mean" in step.logs


def test_completions_of_vllm_may_stay_uncorrected(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeVLLM)
    fields = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_correction": False}
    check(take_step(tmp_path, teacher=teacher(), **fields), reverse_kl)


@pytest.mark.parametrize("credit", [{}, {"entropy_coef": 0.01}, SAMPLED], ids=["direct", "entropy bonus", "sampled"])
def test_under_bf16_the_models_run_in_bf16_and_the_divergence_accumulates_in_fp32(tmp_path, credit):
    """Beside bf16's own error in the hidden states, the loss has none: it equals fp32 logits of bf16 activations."""
    dtypes = []

    def watch(trainer):
        for model in (trainer.model, trainer.teacher.model):
            model.model.layers[0].mlp.up_proj.register_forward_hook(
                lambda module, args, out: dtypes.append(out.dtype) if torch.is_autocast_enabled("cpu") else None
            )

    step = take_step(tmp_path, prepare=watch, model=make_model(), teacher=make_model(**TEACHER), bf16=True, **credit)
    assert set(dtypes) == {torch.bfloat16}
    assert step.loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in step.gradient.values())
    if not credit:
        (inputs,) = step.batches
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            pair = [bf16_operand_logprobs(m, inputs) for m in (make_model(), make_model(**TEACHER))]
        loss = reduce([reverse_kl(*pair)], [loss_mask(inputs)], "dapo")
        assert step.loss.item() == pytest.approx(loss.item(), rel=1e-5)


def bf16_operand_logprobs(model, inputs):
    """bf16 hidden states and head, multiplied without rounding the product."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state.bfloat16().double()
    weight = model.lm_head.weight.bfloat16().double()
    return torch.matmul(hidden[:, inputs["prompt_ids"].shape[1] - 1 : -1], weight.T).log_softmax(-1)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_lora_trains_its_adapter_with_the_gradient_of_autograd(tmp_path, targets):
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(student(), config, autocast_adapter_dtype=False)
    before = copy.deepcopy(model)
    step = take_step(tmp_path, model=model, teacher=teacher())
    assert all("lora_" in name for name in step.gradient)
    check(step, reverse_kl, model=before)


def test_the_head_may_be_trained_beside_lora(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(student(), config, autocast_adapter_dtype=False)
    before = copy.deepcopy(model)
    step = take_step(tmp_path, model=model, teacher=teacher())
    assert any("lm_head.modules_to_save" in name for name in step.gradient)
    check(step, reverse_kl, model=before)


def test_a_head_in_float32_over_a_bf16_student(tmp_path):
    models = [make_model().bfloat16(), make_model(**TEACHER).bfloat16()]
    step = take_step(tmp_path, model=models[0], teacher=models[1], cast_lm_head_to_fp32=True)
    assert step.trainer.model.lm_head.weight.dtype == torch.float32
    (inputs,) = step.batches
    pair = []
    for seed_model in (make_model().bfloat16(), make_model(**TEACHER).bfloat16()):
        head = seed_model.lm_head.weight.detach().float()
        run = SimpleNamespace(model=seed_model.model, lm_head=SimpleNamespace(weight=head))
        with torch.no_grad():
            pair.append(bf16_operand_logprobs(run, inputs))
    loss = reduce([reverse_kl(*pair)], [loss_mask(inputs)], "dapo")
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-4)
