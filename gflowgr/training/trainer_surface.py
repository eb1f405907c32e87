"""Arguments and methods of ``transformers.Trainer`` that the trainer honours or refuses.

The lists name every argument and every public method of the base classes, so that one that a later
version of ``transformers`` adds is noticed (a test compares them) instead of being ignored.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

__all__ = [
    "HONOURED_ARGUMENTS",
    "HONOURED_METHODS",
    "REFUSED_ARGUMENTS",
    "REFUSED_METHODS",
    "check_processes",
    "refuse_arguments",
    "refused_method",
]

_LOSS = "the objectives are losses of whole trajectories"
_RANKS = "an evaluation ranks the catalogue for the split's users"
_ORDER = "the trainer has a data order of its own"
_PUSH = "checkpoints are not pushed: call push_to_hub() after the training"
_LIGER = "the losses are fused with the output head already"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


REFUSED_ARGUMENTS: dict[str, str] = {
    "label_smoothing_factor": _LOSS,
    "label_names": _LOSS,
    "average_tokens_across_devices": "losses are means over the prompts of all processes",
    "neftune_noise_alpha": "prompt and trajectories share embeddings, on which there is no noise",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": "a training step keeps no cache",
    "bf16_full_eval": _RANKS + " in the weights' precision",
    "fp16_full_eval": _RANKS + " in the weights' precision",
    "prediction_loss_only": _RANKS,
    "eval_do_concat_batches": _RANKS,
    "eval_use_gather_object": _RANKS,
    "eval_accumulation_steps": _RANKS,
    "include_for_metrics": _RANKS,
    "batch_eval_metrics": _RANKS,
    "train_sampling_strategy": _ORDER + ", by length",
    "length_column_name": _ORDER + ", by length",
    "dataloader_drop_last": _ORDER + ", in which each epoch has every example",
    "accelerator_config": _ORDER + ", which accelerate does not prepare",
    "optim_target_modules": "log Z, log F and a learned fusion have optimiser groups of their own",
    "parallelism_config": "parameters are shared by DDP or FSDP2",
    "deepspeed": "parameters are shared by DDP or FSDP2: use fsdp",
    "push_to_hub": _PUSH,
    "hub_strategy": _PUSH,
    "hub_always_push": _PUSH,
    "hub_revision": "push_to_hub() pushes to the main branch",
    "remove_unused_columns": "the collator reads all columns",
}
"""Why a value other than the default is refused."""

HONOURED_ARGUMENTS = _names(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen
    log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps
    save_on_each_node save_total_limit enable_jit_checkpoint hub_token
    hub_private_repo hub_model_id load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout fsdp fsdp_config debug skip_memory_metrics do_train do_eval
    do_predict resume_from_checkpoint local_rank
    """
)

REFUSED_METHODS: dict[str, str] = {
    "predict": "rank with gflowgr.GenerativeRecommender, or call evaluate()",
    "prediction_step": "call evaluate(), or compute_loss() for the loss of a batch",
    "evaluation_loop": "call evaluate()",
    "get_eval_dataloader": "evaluate() ranks for the split's users, and loads no batches",
    "get_test_dataloader": "evaluate() ranks for the split's users, and loads no batches",
    "init_hf_repo": "push_to_hub() makes the repository",
    "hyperparameter_search": "the trainer has one model: make a trainer for each trial",
}
"""What to do instead."""

HONOURED_METHODS = _names(
    """
    add_callback autocast_smart_context_manager call_model_init compute_loss
    compute_loss_context_manager create_accelerator_and_postprocess create_model_card
    create_optimizer create_optimizer_and_scheduler create_scheduler end evaluate
    floating_point_ops get_batch_samples get_cp_size get_decay_parameter_names
    get_learning_rates get_num_trainable_parameters get_optimizer_cls_and_kwargs
    get_optimizer_group get_sp_size get_total_train_batch_size get_tp_size get_train_dataloader
    is_local_process_zero is_world_process_zero log log_metrics
    loss_is_scaled_for_ga metrics_format num_examples pop_callback push_to_hub remove_callback
    save_metrics save_model save_state set_initial_training_values store_flos train
    training_step
    """
)


def check_processes(args: TrainingArguments) -> None:
    """Check what depends on how many processes and devices there are.

    Raises:
        ValueError: several GPUs are visible to this one process, or several processes would each
            find a batch size.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would run nn.DataParallel; "
            "start one process per GPU with torchrun or accelerate launch, or show one GPU "
            "with CUDA_VISIBLE_DEVICES=0"
        )
    if args.auto_find_batch_size and args.world_size > 1:
        raise ValueError(
            "auto_find_batch_size must be False with several processes, each of which would "
            f"find its own; got True with {args.world_size} processes"
        )


def refuse_arguments(args: TrainingArguments) -> None:
    """Check, before ``TrainingArguments`` has filled its values in, that nothing is asked for that
    would be ignored.

    Raises:
        ValueError: an argument of :data:`REFUSED_ARGUMENTS` has a value.
    """
    known: dict[str, Field[Any]] = {field.name: field for field in fields(args)}
    for name, reason in REFUSED_ARGUMENTS.items():
        if name not in known:  # of another version of transformers
            continue
        value, field = getattr(args, name), known[name]
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        if value is not None and value != default:
            raise ValueError(f"{name} must be {default!r}: {reason}; got {value!r}")


def refused_method(name: str) -> Any:
    """A method in place of one of :data:`REFUSED_METHODS`, that says what to do instead."""

    def refuse(self: Any, *args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"GFlowGRTrainer has no {name}(): {REFUSED_METHODS[name]}")

    refuse.__name__, refuse.__doc__ = name, f"Refused: {REFUSED_METHODS[name]}."
    return refuse
