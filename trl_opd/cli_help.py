# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Texts that must be on the screen at once: nothing is imported for them. At most 80 characters a line."""

MAIN = """\
usage: trl-opd COMMAND [options]        (trl-opd COMMAND --help explains one)

On-policy distillation for TRL: a student writes, a teacher scores every token.

  demo      distil a small model from scratch on this machine; no downloads
  recipes   the methods of the literature: a table, or one with a YAML to run
  doctor    what is wrong with a run, before it is started
  train     train from a YAML file and fields on the command line
  report    one HTML file about a run, or several side by side
  score     write a teacher's scores of fixed completions, to train without it
  bench     measure speed, memory and accuracy beside the alternatives

A first run:
  trl-opd demo
  trl-opd recipes gkd --yaml > run.yaml     # then name your models and dataset
  trl-opd doctor --config run.yaml
  trl-opd train --config run.yaml --dry-run
  trl-opd train --config run.yaml
  trl-opd report OUTPUT_DIR --open

options:
  -h, --help    this text
  --version     the version

Exit codes: 0 done; 1 it failed, or (doctor) something is wrong; 2 what was
given is wrong; 130 interrupted.
"""

TRAIN = """\
usage: trl-opd train --config run.yaml [--field value ...]

Trains a student on its own completions, every token of which a teacher scores.
Every field can stand in the YAML file (field: value) and on the command line
(--field value), which wins.

The fields to know:
  model_name_or_path      the student: a path or hub id
  teacher_model           the teacher: a path, a hub id, the URL of a vLLM or
                          SGLang server, base (the student without its adapter),
                          self, cache:DIR
  dataset_name            the prompts, in a column `prompt`: data.jsonl (.json,
                          .parquet, .csv), a folder, or a dataset of the hub
  output_dir              where checkpoints, logs and the model go
  recipe                  a method by its name (trl-opd recipes)
  learning_rate           about 1e-4 with LoRA, 1e-6 to 2e-5 without
  per_device_train_batch_size   completions in a micro-batch
  max_completion_length   tokens that the student may write
  max_steps               optimizer steps (or num_train_epochs)
  use_peft, lora_r        train an adapter instead of the whole student;
                          load_in_4bit: of a quantized model (QLoRA)

More that is often used:
  gradient_accumulation_steps, num_generations, reward_funcs (names of
  trl.rewards, or my_module.my_function), prompt_column, eval_strategy,
  teacher_quantization, use_vllm, chat_template_kwargs, report_to

This command's own options:
  --config FILE           the YAML file
  --dry-run               check everything, print the plan, load no weights
  --resume auto           go on where a run of the same configuration stopped
                          (the default); never: start anew, and keep what is
                          there in _earlier.N; always: go on in any case
  --traceback             where in the code an error arose
  --help-all              all fields, in groups

Examples:
  trl-opd train --config run.yaml --dry-run
  trl-opd train --config run.yaml --learning_rate 5e-5 --max_steps 100
  trl-opd train --model_name_or_path Qwen/Qwen3-1.7B --use_peft \\
      --teacher_model Qwen/Qwen3-8B --dataset_name data.jsonl --output_dir out
  accelerate launch -m trl_opd.train --config run.yaml       # several GPUs
  torchrun --nproc-per-node 8 -m trl_opd.train --config run.yaml

Exit codes: 0 done (also: had been finished before); 1 training failed, an alarm
stopped it, or a dry run with preflight: strict found something; 2 what was
given is wrong; 130 interrupted (the same command goes on at the last
checkpoint).
"""

SCORE = """\
usage: trl-opd score --teacher T --dataset D --output DIR [--field value ...]

Asks a teacher once about the completions of a dataset and keeps its log-probs,
so that a student can be trained on them without the teacher (off-policy):
  trl-opd train --teacher_model cache:DIR ...

A run that was stopped goes on where it was, and rows added to the dataset are
added. Every field can also stand in a YAML file: --config FILE.

What is scored:
  --teacher T             path, hub id, or URL of a vLLM or SGLang server
                          (several with commas)
  --dataset D             .jsonl, .json or .parquet with the columns prompt and
                          completion (or prompt_ids and completion_ids), a
                          folder of save_to_disk, or a dataset of the hub
  --dataset_config, --dataset_split    which part of it (split: train)
  --output DIR            the cache; continued if it is there

What is kept:
  --support S             teacher_top_k (default), or sampled: the log-probs of
                          the completions' own tokens
  --support_size K        log-probs of a token (64)
  --temperature X         of the log-probs (1.0)
  --logprob_dtype D       float32 (default) or float16
  --compression C         none (default) or zstd
  --shard_tokens N        completion tokens of a file (65536)

How texts become tokens:
  --tokenizer T           path of the student's tokenizer (the teacher's)
  --append_eos B          whether text completions end in the end token (true)
  --teacher_chat_template own (default) or student
  --chat_template_kwargs, --teacher_chat_template_kwargs    as in training

How the teacher runs:
  --batch_size N          samples of a forward pass (8)
  --max_length N          longest sample in tokens (what the teacher takes)
  --overflow O            what becomes of longer ones: error (default) or skip
  --teacher_quantization, --teacher_device, --teacher_model_init_kwargs,
  --trust_remote_code     as in training

Example:
  trl-opd score --teacher Qwen/Qwen3-8B --dataset data.jsonl --output scores
"""
