# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What is known of a run without any weights: tokenizers, configurations, and the first prompts as both read them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from types import SimpleNamespace
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving
from trl.data_utils import is_conversational

from ..checks import Run
from ..preflight import config_of, student_kwargs, student_tokenizer, tokenizer_of
from ..teachers import AdapterTeacher, LocalTeacher, RoutedTeacher, SelfTeacher
from ..teachers.base import leaves, teacher_name
from ..views import PromptRenderer, make_renderer, renders_alike
from ..vocabulary import as_tokenizer


@dataclass
class Reading:
    """
    One prompt as student and teacher read it.

    Args:
        index (`int`): Row of the dataset.
        prompt (`str` or `list[dict]`): The `prompt` column.
        own_prompt (`bool`): Whether the teacher was given another prompt (the column `teacher_prompt`).
        student_ids, teacher_ids (`list[int]`): The ids.
    """

    index: int
    prompt: Any
    own_prompt: bool
    student_ids: list[int]
    teacher_ids: list[int]


@dataclass
class Known:
    """One model of a run. `label` names it in a sentence; `shared`: it is the student, or the student's adapter."""

    label: str
    tokenizer: PreTrainedTokenizerBase | None = None
    config: PretrainedConfig | None = None
    generation_config: GenerationConfig | None = None
    max_length: int | None = None
    shared: bool = False
    route: str | None = None  # whose samples it gets, if it is one of a RoutedTeacher's
    renderer: PromptRenderer | None = None
    alike: bool = True

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a completion of this model: those of its generation config, and its tokenizer's."""
        return self._ids("eos_token_id")

    def _ids(self, name: str) -> list[int]:
        found: list[int] = []
        for source in (self.tokenizer, self.generation_config):
            ids = getattr(source, name, None)
            found += [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return list(dict.fromkeys(found))


@dataclass
class RunFacts:
    """
    A run without its weights.

    Args:
        run ([`Run`]): The trainer's arguments.
        student ([`Known`]): The student.
        teachers (`list[Known]`): Every teacher that the run's is made of.
        rows (`list[Mapping]`): First rows of the training data.
        num_rows (`int`, *optional*): How many there are.
        num_rendered (`int`): How many of `rows` are rendered.
    """

    run: Run
    student: Known
    teachers: list[Known]
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    num_rows: int | None = None
    num_rendered: int = 8

    @property
    def args(self) -> Any:
        return self.run.args

    @property
    def prompts(self) -> list[tuple[int, Any]]:
        """Row number and prompt of the rows that are rendered."""
        processor, tokenizer = self.run.processing_class, self.student.tokenizer
        if isinstance(processor, ProcessorMixin) and getattr(tokenizer, "chat_template", None) is None:
            return []  # the template is the processor's
        return [(i, row["prompt"]) for i, row in enumerate(self.rows[: self.num_rendered]) if has_text(row)]

    @property
    def conversational(self) -> bool:
        """Whether the prompts are messages; GRPOTrainer decides by the first of a batch."""
        return any(not isinstance(prompt, str) for _, prompt in self.prompts)

    @property
    def uses_lora(self) -> bool:
        """Whether an adapter is trained rather than the weights."""
        model = self.run.model
        return self.run.peft_config is not None or (isinstance(model, nn.Module) and is_peft_model(model))

    @property
    def has_policy_gradient(self) -> bool:
        """Whether GRPO's surrogate has a gradient in this run."""
        rewards = self.run.has_rewards or self.run.environment_factory is not None
        return self.args.credit in ("policy_gradient", "combined") or (rewards and self.args.reward_coef > 0)

    @cached_property
    def side(self) -> Any:
        """What [`views.make_renderer`] asks a trainer for."""
        tokenizer, tools = self.student.tokenizer, self.run.tools
        template = None
        if tools and tokenizer is not None and not is_chat_template_prefix_preserving(tokenizer):
            template = get_training_chat_template(tokenizer)
        kwargs = self.args.chat_template_kwargs or {}
        return SimpleNamespace(
            args=self.args, _tokenizer=tokenizer, chat_template=template, chat_template_kwargs=kwargs
        )

    def student_ids(self, prompt: Any) -> list[int]:
        """Ids of a prompt, made as `GRPOTrainer._tokenize_prompts` makes them."""
        tokenizer = self.student.tokenizer
        assert tokenizer is not None
        if isinstance(prompt, str):
            return list(tokenizer(text=[prompt])["input_ids"][0])
        return list(
            tokenizer.apply_chat_template(
                conversation=[prompt],
                tools=self.run.tools or None,
                chat_template=self.side.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.side.chat_template_kwargs,
            )["input_ids"][0]
        )

    def readings(self, teacher: Known) -> list[Reading]:
        """
        The first prompts as student and teacher read them; none where a `teacher_view` makes the teacher's.

        Raises:
            Exception: Whatever a chat template raises.
        """
        if teacher.renderer is None or self.student.tokenizer is None or self.run.teacher_view is not None:
            return []
        column = getattr(self.run.teacher, "column", "teacher")
        found = []
        for index, prompt in self.prompts:
            row = self.rows[index]
            if teacher.route is not None and row.get(column) != teacher.route:
                continue
            ours, given = self.student_ids(prompt), row.get("teacher_prompt")
            if given is None and (teacher.alike or isinstance(prompt, str)):
                theirs = ours
            else:
                tools = self.run.tools or None
                theirs = list(teacher.renderer.render(prompt if given is None else given, ours, tools))
            found.append(Reading(index, prompt, given is not None, ours, theirs))
        return found


def has_text(row: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt that a tokenizer alone can render: images are a processor's."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return True
    if not prompt or not is_conversational({"prompt": prompt}):
        return False
    parts = [part for m in prompt if isinstance(m.get("content"), list) for part in m["content"]]
    return all(part.get("type") == "text" for part in parts) and not any(row.get(k) for k in ("image", "images"))


def gather(
    run: Run,
    teacher_tokenizers: Sequence[Any],
    *,
    num_samples: int = 8,
    num_scanned: int = 8,
    read_streams: bool = False,
) -> RunFacts:
    """
    Everything that is known of a run without its weights.

    Args:
        run ([`Run`]): The trainer's arguments.
        teacher_tokenizers (`Sequence`): Of [`teacher_preflight.check_teacher`].
        num_samples (`int`), num_scanned (`int`): Rows of the training data that are rendered, and that are counted.
        read_streams (`bool`): Whether a streaming dataset may be read.
    """
    kwargs = student_kwargs(run.args)
    config = config_of(run.model, kwargs)
    student = Known(
        "the student",
        student_tokenizer(run.model, run.args, run.processing_class),
        config,
        _generation_config(run.model, config, kwargs),
        _max_length(config),
    )
    dataset = run.datasets["train_dataset"]
    rows = _first_rows(dataset, max(num_samples, num_scanned), read_streams)
    num_rows = len(dataset) if hasattr(dataset, "__len__") else None
    facts = RunFacts(run, student, [], rows, num_rows, num_samples)
    facts.teachers = _teachers(facts, list(teacher_tokenizers))
    return facts


def _teachers(facts: RunFacts, tokenizers: list[Any]) -> list[Known]:
    teacher, student, found = facts.run.teacher, facts.student, list[Known]()
    routed = isinstance(teacher, RoutedTeacher)
    members = list(zip(teacher.names, teacher.members, strict=True)) if routed else [(None, teacher)]
    total = sum(1 for _ in leaves(teacher))
    for i, (name, member) in enumerate(members):
        given = tokenizers[i] if i < len(tokenizers) else None
        renderer = None if student.tokenizer is None else make_renderer(facts.side, given)
        first = as_tokenizer(given)
        for leaf in leaves(member):
            label = "the teacher" if total == 1 else f"the teacher {name or teacher_name(leaf)!r}"
            known = Known(label, route=name, renderer=renderer)
            known.alike = renderer is None or renders_alike(renderer, facts.side)
            if isinstance(leaf, (AdapterTeacher, SelfTeacher)):
                known.shared, known.max_length = True, student.max_length
            elif isinstance(leaf, LocalTeacher):
                known.config = config_of(leaf.model, leaf.init_kwargs)
                known.generation_config = _generation_config(leaf.model, known.config, leaf.init_kwargs)
                known.max_length = _max_length(known.config)
                known.tokenizer = first or tokenizer_of(leaf.model, known.config, leaf.init_kwargs)
                first = None  # the next leaf of a mixture has a tokenizer of its own
            else:
                known.tokenizer, known.max_length = first, getattr(leaf, "max_length", None)
            found.append(known)
    return found


def _max_length(config: PretrainedConfig | None) -> int | None:
    return None if config is None else LocalTeacher("", config=config).max_length


def _generation_config(model: Any, config: PretrainedConfig | None, kwargs: Mapping[str, Any]) -> Any:
    """What the model has, or will have when it is loaded."""
    if not isinstance(model, str):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return getattr(base, "generation_config", None)
    keep = {k: kwargs[k] for k in ("revision", "subfolder", "token", "cache_dir") if kwargs.get(k) is not None}
    try:
        return GenerationConfig.from_pretrained(model, **keep)
    except (OSError, ValueError):
        return None if config is None else GenerationConfig.from_model_config(config)


def _first_rows(dataset: Any, number: int, read_streams: bool) -> list[Mapping[str, Any]]:
    """The first rows, without images; of a stream only if it may be read."""
    if isinstance(dataset, (dict, DatasetDict, IterableDatasetDict)) or dataset is None:
        return []
    rows: Iterable[Any]
    if isinstance(dataset, IterableDataset):
        rows = islice(dataset, number) if read_streams else []
    elif isinstance(dataset, Dataset):
        if dataset.format["type"] != "custom":  # a function of the user may need the other columns
            wanted = [c for c in dataset.column_names if c not in ("image", "images")]
            dataset = dataset.select_columns(wanted)
        rows = (dataset[i] for i in range(min(number, len(dataset))))
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        rows = (dataset[i] for i in range(min(number, len(dataset))))
    else:
        return []
    return [row for row in rows if isinstance(row, Mapping)]
