"""
Two processes record rollouts into one cache, and two replay them.

    torchrun --nproc-per-node=2 cache_two_processes.py FOLDER
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401
import torch
from datasets import Dataset
from processes import leave
from tiny import make_model, make_tokenizer, trainer_config

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer, TeacherScores
from trl_opd.teachers import CachedTeacher, RecordingTeacher


def uniform(batch):
    """Five entries a token."""
    ids = torch.arange(5).expand(*batch.completion_ids.shape, 5)
    return TeacherScores(topk_ids=ids, topk_logprobs=torch.full(ids.shape, -2.0))


def run(folder, teacher, steps):
    trainer = OnPolicyDistillTrainer(
        model=make_model(),
        teacher_model=teacher,
        args=OnPolicyDistillConfig(
            **trainer_config(
                folder / "out",
                support="teacher_top_k",
                support_size=5,
                num_generations=3,
                per_device_train_batch_size=3,
                max_steps=steps,
            )
        ),
        train_dataset=Dataset.from_dict({"prompt": ["abc", "x y"]}),
        processing_class=make_tokenizer(),
    )
    seen, compute = [], trainer._compute_loss

    def keep(model, inputs):
        masks = (inputs["prompt_mask"].bool(), inputs["completion_mask"].bool())
        for i in range(len(inputs["prompt_ids"])):
            rows = (inputs["prompt_ids"][i][masks[0][i]], inputs["completion_ids"][i][masks[1][i]])
            seen.append([row.tolist() for row in rows])
        return compute(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    return seen


def main(folder: Path) -> None:
    recorded = run(folder, RecordingTeacher(uniform, folder / "cache"), 1)
    torch.distributed.barrier()
    replayed = run(folder, CachedTeacher(folder / "cache"), 2)
    rank = torch.distributed.get_rank()
    (folder / f"seen-{rank}.json").write_text(json.dumps([recorded, replayed]))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
