"""What GRPOTrainer takes as input (prompts, tools, environments, streams, several updates a rollout) still works."""

from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from steps import build, check, full_logprobs, loss_mask, record, reverse_kl, student, take_step
from tiny import SPECIAL, make_model, make_prompts, make_tokenizer
from tokenizers import decoders

TEACHER = {"hidden_size": 24, "seed": 1}
SAMPLED = {"credit": "policy_gradient", "support": "sampled"}


def teacher(**kwargs):
    return make_model(**TEACHER, **kwargs).double()


def decoded(step, key):
    tokenizer = step.trainer.processing_class
    mask = key.replace("ids", "mask")
    return [
        tokenizer.decode(row[keep.bool()]).replace(" ", "")
        for inputs in step.batches
        for row, keep in zip(inputs[key], inputs[mask], strict=True)
    ]


def messages(*contents):
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": c}] for c in contents]})


def test_standard_prompts_are_given_as_they_are(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), shuffle_dataset=False)
    assert sorted(decoded(step, "prompt_ids")) == sorted(["abc", "helloworld", "x", "thequickbrownfox"])
    check(step, reverse_kl)


def test_conversations_go_through_the_chat_template_with_its_kwargs(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        chat_template_kwargs={"no_think": True},
        arguments={"train_dataset": messages("hi", "who", "abc", "x y z")},
    )
    prompts = decoded(step, "prompt_ids")
    assert "<|im_start|>user\nwho<|im_end|><|im_start|>assistant\n<think></think>" in prompts
    assert all(prompt.endswith("<think></think>") for prompt in prompts)
    check(step, reverse_kl)


TEXT = "".join(chr(i) for i in range(32, 127)) + "\n"
TOOL_VOCAB = len(SPECIAL) + len(TEXT)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'


def tool_tokenizer():
    """A tokenizer with Qwen3's template, which renders and parses tool calls."""
    tokenizer = make_tokenizer(TEXT)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # no spaces between the characters
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def script(trainer, first):
    """The student calls the tool once in every other sample, then answers with letters."""
    tokenizer, turns = trainer.processing_class, []

    def generate(prompt_ids, *args, **kwargs):
        turns.append(prompt_ids)
        texts = [
            first if len(turns) == 1 and i % 2 == 0 else "the sum is " + "7" * (i + 1) + "<|im_end|>"
            for i in range(len(prompt_ids))
        ]
        return [tokenizer(text)["input_ids"] for text in texts], None

    trainer._generate_single_turn = generate
    return turns


def tool_step(tmp_path, **kwargs):
    arguments = kwargs.pop("arguments")
    model = student(vocab_size=TOOL_VOCAB)
    return take_step(
        tmp_path,
        prepare=lambda trainer: script(trainer, CALL),
        model=model,
        teacher=teacher(vocab_size=TOOL_VOCAB),
        max_completion_length=256,
        arguments={
            "train_dataset": messages("what is 3 + 4?", "hi", "what is 3 and 4?", "hello"),
            "processing_class": tool_tokenizer(),
            **arguments,
        },
        **kwargs,
    )


def check_tool_step(step, result):
    """The call and the answers are trained on, the tool's result is not; loss and gradient are those of autograd."""
    (inputs,) = step.batches
    tokenizer = step.trainer.processing_class
    written, outside = [], []
    for ids, keep, own in zip(inputs["completion_ids"], inputs["completion_mask"], inputs["tool_mask"], strict=True):
        written.append(tokenizer.decode(ids[(keep * own).bool()]))
        outside.append(tokenizer.decode(ids[(keep * (1 - own)).bool()]))
    called = [text for text in written if "tool_call" in text]
    assert len(called) == 2
    assert all(text.startswith(CALL) and "the sum is 7" in text for text in called)
    assert sorted(outside)[:2] == ["", ""]
    assert all(f"<tool_response>\n{result}\n</tool_response>" in text for text in sorted(outside)[2:])
    assert step.logs["tools/call_frequency"] == 0.5
    check(step, reverse_kl, model=student(vocab_size=TOOL_VOCAB), teacher=teacher(vocab_size=TOOL_VOCAB))


def test_tools_are_called_and_their_results_stay_out_of_the_loss(tmp_path):
    def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            The sum.
        """
        return a + b

    check_tool_step(tool_step(tmp_path, arguments={"tools": [add]}), "7")


class Calculator:
    """An environment that owns a tool."""

    def __init__(self):
        self.calls = 0

    def reset(self, **kwargs) -> str:
        return " Use the tool."

    def add(self, a: int, b: int) -> str:
        """
        Add two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            The sum, in words.
        """
        self.calls += 1
        return f"sum {a + b}"


class RewardingCalculator(Calculator):
    """And a reward."""

    def get_reward(self) -> float:
        return float(self.calls)


def test_an_environment_brings_tools_and_observations(tmp_path):
    step = tool_step(tmp_path, arguments={"environment_factory": Calculator})
    check_tool_step(step, "sum 7")
    assert all(
        "Use the tool." in text for text in step.trainer.processing_class.batch_decode(step.batches[0]["prompt_ids"])
    )
    assert not [name for name in step.logs if "reward" in name]


def test_an_environment_may_own_the_prompts(tmp_path):
    step = tool_step(tmp_path, arguments={"environment_factory": Calculator, "train_dataset": None})
    prompts = step.trainer.processing_class.batch_decode(step.batches[0]["prompt_ids"])
    assert all("user\n Use the tool.<|im_end|>" in prompt for prompt in prompts)


def test_the_reward_of_an_environment_is_mixed_in(tmp_path):
    fields = {"num_generations": 2, "reward_coef": 0.5}
    step = tool_step(tmp_path, arguments={"environment_factory": RewardingCalculator}, **fields)
    assert step.trainer.reward_func_names == ["RewardingCalculator"]
    assert step.logs["rewards/RewardingCalculator/mean"] == 0.5
    (inputs,) = step.batches
    assert sorted(round(a, 3) for a in inputs["advantages"].tolist()) == [-0.354, -0.354, 0.354, 0.354]


def test_the_reward_of_an_environment_needs_two_completions(tmp_path):
    with pytest.raises(ValueError, match="num_generations must be at least 2 with rewards, got 1"):
        tool_step(tmp_path, arguments={"environment_factory": RewardingCalculator})


def test_a_rollout_function_brings_the_completions(tmp_path):
    def rollout(prompts, trainer):
        ids = [trainer.processing_class(text=prompt)["input_ids"] for prompt in prompts]
        completions = [[20 + i] * (i + 2) for i in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    step = take_step(tmp_path, teacher=teacher(), arguments={"rollout_func": rollout})
    assert sorted(loss_mask(step.batches[0]).sum(1).tolist()) == [2, 3, 4, 5]
    check(step, reverse_kl)


def test_a_stream_of_prompts_trains(tmp_path):
    stream = make_prompts(8).to_iterable_dataset()
    step = take_step(tmp_path, teacher=teacher(), arguments={"train_dataset": stream})
    check(step, reverse_kl)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 2, "max_steps": 4},
        {"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4},
    ],
    ids=lambda fields: ", ".join(fields),
)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_several_updates_a_rollout_each_follow_the_gradient_at_the_current_weights(tmp_path, fields, loss_type):
    """Every step, later ones of the same rollout too: loss = divergence of the weights of that moment."""
    trainer = build(
        tmp_path, teacher=teacher(), loss_type=loss_type, per_device_train_batch_size=2, learning_rate=1e-3, **fields
    )
    step = record(trainer)
    weights, compute_loss = [], trainer._compute_loss

    def keep(model, inputs):
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return compute_loss(model, inputs)

    trainer._compute_loss = keep
    generations, generate = [], trainer._generate
    trainer._generate = lambda prompts: generations.append(len(prompts)) or generate(prompts)
    trainer.train()

    accumulation = fields.get("gradient_accumulation_steps", 1)
    window = fields.get("steps_per_generation", 1)
    assert len(generations) == 4 * accumulation // (window * fields.get("num_iterations", 1))
    for i in range(0, len(step.batches), window):
        batches = step.batches[i : i + window]
        tokens = sum(loss_mask(inputs).sum() for inputs in batches)
        for inputs, state, loss in zip(batches, weights[i : i + window], step.losses[i : i + window], strict=True):
            model = student()
            model.load_state_dict(state)
            with torch.no_grad():
                pair = [full_logprobs(m, inputs) for m in (model, teacher())]
            values, mask = reverse_kl(*pair) * loss_mask(inputs), loss_mask(inputs)
            if loss_type == "dapo":  # the mean over the generation batch, of which this is one window's share
                expected = values.sum() / (tokens / window * accumulation)
            else:
                expected = (values.sum(1) / mask.sum(1)).mean() / accumulation
            assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
def test_gradient_checkpointing_changes_nothing(tmp_path, credit):
    steps = [
        take_step(tmp_path / str(on), teacher=teacher(), gradient_checkpointing=on, **credit) for on in (True, False)
    ]
    assert steps[0].trainer.model.is_gradient_checkpointing
    assert steps[0].loss.item() == pytest.approx(steps[1].loss.item(), rel=1e-12)
    for name, gradient in steps[0].gradient.items():
        assert torch.allclose(gradient, steps[1].gradient[name], rtol=1e-9, atol=1e-12), name
