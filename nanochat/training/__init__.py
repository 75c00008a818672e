"""Parts of the training loops; the loops themselves are in the stage scripts.

Begin with `loop.py`: what one optimizer step does. `run.py` is the state of a run and what a checkpoint stores of it,
`saving.py` how that is written meanwhile, `interrupts.py` what may end a run early, `metrics.py` speed and logs,
`progress.py` what one sees of it. `optim.py` applies the updates of `updates.py`, Muon and AdamW; `schedule.py` is what
depends on the step, `recipe.py` what follows from depth, hardware and budget. `pretraining.py` and `finetuning.py` are
how the stages begin, `check_data.py` only looks at their data, `rl.py` is the learning from rewards.

Not here: the model, its data and its evaluation.
"""
