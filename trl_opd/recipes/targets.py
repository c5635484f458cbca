# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Methods that aim at another distribution than the teacher's."""

from .entry import Recipe

TITLE = "Targets"
_SAMPLED = {"credit": "policy_gradient", "support": "sampled"}

RECIPES = (
    Recipe(
        name="exopd",
        title="G-OPD / ExOPD",
        paper="Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
        authors="Yang, Liu, Xie, Yang, Yang, Lin",
        year=2026,
        arxiv="2602.12125",
        section="4.3",
        idea="What the teacher gained over a reference is a reward: take more of it than the teacher has.",
        formula="A_t = −[log s − log r − λ (log t − log r)](y_t), λ = 1.25: the reverse KL to ∝ r^(1−λ) t^λ",
        teacher="TOK",
        fields={**_SAMPLED, "target": "extrapolate", "target_kwargs": {"scale": 1.25}},
        published={
            "learning_rate": 1e-5,
            "batch": 1024,
            "max_completion_length": 16384,
            "cap of the rollouts' importance ratio": 5,
        },
        needs=("reference_model",),
        fidelity="exact",
        left_out="The reference is the student's initial policy (reference_model='self', or 'base' with LoRA), or "
        "with reward correction the teacher's own base. scale=1 is opd, below 1 interpolates. The cap of the ratio "
        "is vLLM's field vllm_importance_sampling_clip_max.",
        watch="reward, and the share of valid formats: at a large λ near-deterministic outputs collapse.",
        aliases=("gopd", "g_opd"),
    ),
    Recipe(
        name="direct_opd",
        title="Direct-OPD",
        paper="Weak-to-Strong Generalization via Direct On-Policy Distillation",
        authors="Feng, Gao, Chi, Wu, Zhang, Jiang, He, Ma, Zhang, Zhou",
        year=2026,
        arxiv="2607.05394",
        idea="Reward the student by what a small teacher gained in its own training, whatever its level.",
        formula="A_t = log t(y_t) − log t_ref(y_t)",
        teacher="TOK",
        fields={
            **_SAMPLED,
            "target": "affine",
            "target_kwargs": {"teacher": 1.0, "reference_1": -1.0, "student": 1.0},
        },
        needs=("reference_model",),
        fidelity="approximation: as described by secondary sources; what holds the student near its start is left out",
        evidence="S",
        left_out="A KL to the start: set beta, GRPO's KL to the reference.",
        watch="distill/student_entropy and the KL to the start: nothing in the advantage ends the push.",
    ),
    Recipe(
        name="delta_kd",
        title="Delta-KD",
        paper="Delta Knowledge Distillation for Large Language Models",
        authors="Cao, Kang, Xing, Jiang",
        year=2025,
        arxiv="2509.14526",
        section="5.1",
        idea="Give the student the shift that tuning gave the teacher, on top of its own start.",
        formula="KL(π* ‖ s), π* ∝ s_raw (t_tuned / t_raw)^α",
        fields={"target": "delta", "target_kwargs": {"scale": 1.0}, "divergence": "forward_kl"},
        needs=("two_references",),
        fidelity="sketch",
        evidence="U",
        left_out="The supervised term λ SFT + (1 − λ) KL, other shift operators (its 'parallelogram'), and given "
        "text: the student's is used here (student_fraction=0.0 for the dataset's). α = 1 is this library's.",
        watch="distill/loss starts at what tuning changed, not at the gap to the teacher.",
    ),
    Recipe(
        name="taid",
        title="TAID",
        paper="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language "
        "Models",
        authors="Shing, Misaki, Bao, Yokoi, Akiba",
        year=2025,
        venue="ICLR 2025",
        arxiv="2501.16937",
        section="5.1",
        idea="Aim at a point between student and teacher that moves to the teacher as the loss allows.",
        formula="KL(p_t ‖ s), p_t = softmax((1 − t) sg z_s + t z_T); t from 0.4 to 1, at least linearly",
        fields={
            "target": "taid",
            "target_kwargs": {"t": 0.4},
            "divergence": "forward_kl",
            "schedules": {
                "target_kwargs.t": {"type": "taid", "start": 0.4, "end": 1.0, "alpha": 5e-4, "momentum": 0.99}
            },
        },
        fidelity="approximation: on the student's text, where the paper trains on given text (student_fraction=0.0)",
        conflict="The survey describes a mixture of probabilities; paper and code interpolate logits, and so does "
        "this.",
        watch="distill/loss is small by design: judge by distill/forward_kl to the teacher, and the schedule's t.",
    ),
    Recipe(
        name="veto",
        title="Veto",
        paper="Stable On-Policy Distillation through Adaptive Target Reformulation",
        authors="Jang et al.",
        year=2026,
        arxiv="2601.07155",
        section="4.2",
        idea="Where the student gives a token no chance, the teacher cannot force it: a target near both.",
        formula="KL(Q ‖ s), Q ∝ t · sg(s)^β; β from 0.8 to 0, linearly",
        fields={
            "target": "veto",
            "target_kwargs": {"beta": 0.8},
            "divergence": "forward_kl",
            "schedules": {"target_kwargs.beta": {"type": "linear", "start": 0.8, "end": 0.0}},
        },
        published={"β₀": {"reasoning": 0.8, "code": 1.0, "summaries": 0.3}, "learning_rate": 1e-5, "epochs": 3},
        fidelity="approximation: as described by a third party's notes",
        evidence="S",
        left_out="Its reverse form: set divergence='reverse_kl' (at β = 1 it is REINFORCE on the teacher's "
        "log-probs).",
        watch="distill/forward_kl to the teacher as β falls.",
    ),
    Recipe(
        name="aligndistil",
        title="AlignDistil",
        paper="AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
        authors="Zhang, Zhang, et al.",
        year=2025,
        venue="ACL 2025",
        arxiv="2503.02832",
        section="4.3",
        idea="Extrapolate from a model tuned on reversed preferences to one tuned on them, farther at tokens where "
        "the two disagree.",
        formula="(β/w) KL(s ‖ softmax z*), z* = z_DPO + w (z_DPO − z_rev), w = 15 Σ_v |p_DPO − p_rev| + 0.001",
        teacher="FULL",
        fields={"target": "contrast", "target_kwargs": {"scale": 15.0, "floor": 0.001}},
        needs=("reference_model",),
        fidelity="as published code",
        left_out="Training the two models (DPOTrainer, once with chosen and rejected exchanged): teacher_model is "
        "the first, reference_model the second. The global β is distill_coef. On given text the code has scale 10.",
        watch="reward of a preference model, and the KL to the start.",
    ),
)
