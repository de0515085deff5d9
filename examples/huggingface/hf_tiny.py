"""A Hugging Face Trainer as a workload: it trains and saves as ever; Relight stops it, and keeps its saves."""

import shutil
from pathlib import Path

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from relight import LoopControl, LoopWorkload


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = 16


class Bytes(torch.utils.data.Dataset):
    """The library's own source, as bytes, in blocks of 32."""

    def __init__(self) -> None:
        text = Path(transformers.trainer_callback.__file__).read_bytes()[:8192]
        self.blocks = torch.tensor(list(text)).view(-1, 32)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class HuggingFace(LoopWorkload[Config]):
    """A tiny GPT-2 on bytes, trained by transformers.Trainer."""

    Config = Config

    def run(self, ctl: LoopControl) -> torch.nn.Module:
        knobs = ctl.execution
        arguments = transformers.TrainingArguments(
            output_dir="hf",
            num_train_epochs=knobs.max_epochs,
            max_steps=knobs.max_steps or -1,
            per_device_train_batch_size=knobs.batch_size,
            learning_rate=knobs.learning_rate,
            seed=knobs.seed,
            save_strategy="steps",
            save_steps=10,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=self.env.device.type == "cpu",
        )
        sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": self.config.width, "n_layer": 1, "n_head": 2}
        shape = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(shape)
        trainer = transformers.Trainer(model, arguments, train_dataset=Bytes(), callbacks=[Relight(ctl)])
        trainer.train(resume_from_checkpoint=_own_copy(ctl))
        return model


class Relight(transformers.TrainerCallback):
    def __init__(self, ctl: LoopControl) -> None:
        self.ctl = ctl

    def on_step_end(self, args, state, control, **kwargs):
        if self.ctl.should_stop():
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.ctl.report(state.global_step - 1, **{name: value for name, value in logs.items() if name != "epoch"})

    def on_save(self, args, state, control, **kwargs):
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.ctl.save(state.global_step, lambda directory: _move(saved, directory), epoch=int(state.epoch))


def _own_copy(ctl: LoopControl) -> str | None:
    """Under the name that the trainer gave it: it reads the step off it."""
    restored = ctl.restored()
    if restored is None:
        return None
    (found,) = restored.iterdir()
    return shutil.copytree(found, Path("hf") / found.name)


def _move(saved: Path, directory: Path) -> None:
    shutil.move(saved, directory / saved.name)
