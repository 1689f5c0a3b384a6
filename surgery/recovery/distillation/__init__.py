"""The distillation of a cut model: `run` does it, `student` is what is trained, `divergence` what is made small, `descent` how."""
