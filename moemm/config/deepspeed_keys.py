"""DeepSpeed's configuration keys as data, as of DeepSpeed 0.19.8; a test compares them with the installed version.

DeepSpeed ignores top-level keys that it does not know. `deepspeed.extra` may hold only these, so that a typo is an
error.
"""

from __future__ import annotations

PASSED = frozenset(
    {
        "aio",
        "bf16",
        "comet",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "wandb",
        "zero_optimization",
    }
)
"""Handed to DeepSpeed as they are."""

OWNED = {
    "activation_checkpointing": "train.activation_checkpointing",
    "bfloat16": "train.precision",
    "fp16": "train.precision (fp32 or bf16)",
    "torch_autocast": "train.precision",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "managed_gradient_accumulation": "train.accumulation",
    "gradient_clipping": "train.clip",
    "optimizer": "train.lr, train.betas and train.weight_decay",
    "zero_allow_untested_optimizer": "train.lr, train.betas and train.weight_decay (AdamW is moemm's own)",
    "zero_force_ds_cpu_optimizer": "train.lr, train.betas and train.weight_decay (AdamW is moemm's own)",
    "scheduler": "train.warmup and train.min_lr",
    "steps_per_print": "train.log_every",
    "checkpoint": "train.checkpoint",
    "datastates_ckpt": "train.checkpoint",
    "data_efficiency": "data.temperature and data.modality_dropout",
    "dataloader_drop_last": "data (moemm has its own loader)",
}
"""Set by moemm: key -> the key of moemm to use in its place."""

UNUSED = {
    "autotuning": "moemm is started without DeepSpeed's autotuner",
    "compile": "moemm does not compile through DeepSpeed",
    "expert_parallel": "moemm spreads experts itself: deepspeed.ep_size",
    "gradient_allreduce_op": "moemm's losses are those of the global batch, which needs the mean over ranks",
    "hybrid_engine": "it is for generation with language models",
    "pipeline": "the model is no pipeline module",
    "seq_parallel_communication_data_type": "moemm does not split sequences over ranks",
    "tensor_parallel": "moemm does not split layers over ranks",
    "use_data_before_expert_parallelism": "moemm has its own experts",
    "vocabulary_size": "DeepSpeed only prints a warning about it",
    "weight_quantization": "it is for inference",
}
"""Known to DeepSpeed, without effect or harmful in moemm: key -> why."""

REMOVED = frozenset(
    {
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    }
)
"""Removed from DeepSpeed, which refuses them."""

ZERO_OWNED = {"stage": "deepspeed.zero_stage"}
"""Keys inside `zero_optimization` that moemm sets."""

ZERO_PASSED = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "compute_grad_norm",
        "contiguous_gradients",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    }
)
"""Keys inside `zero_optimization` that are handed on."""

ZERO_REFUSED = frozenset(
    {
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "legacy_stage1",
        "save_muon_momentum_buffer_in_memory",
        "stage3_gather_fp16_weights_on_model_save",
        "zenflow",
    }
)
"""Keys inside `zero_optimization` that are deprecated, or for optimizers and checkpoints that moemm does not use."""
