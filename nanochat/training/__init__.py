"""Parts of the training loops; the loops themselves stand in the stage scripts.

Begin with `loop.py`: what one optimizer step does, and what a run keeps in its checkpoints. `optim.py` is Muon and
AdamW, `schedule.py` what depends on the step, `recipe.py` what follows from depth, hardware and budget, `metrics.py`
speed and logs. `finetuning.py` and `rl.py` are the parts of the chat stages.

Not here: the model, its data and its evaluation.
"""
