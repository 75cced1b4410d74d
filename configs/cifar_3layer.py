"""Figure 4, bottom row, one panel: three hidden layers 8-8-8 per branch on CIFAR-10 (I = 1, 3, 5, 50,000).

    python scripts/run.py --config=configs/cifar_3layer.py:I=5

The setting is that of cifar_1layer.py with deeper branches and rate 0.2 times I.  The paper's largest, I = 50,000, has
1.2e9 parameters: 5 GB for each network in float32, and training needs several times that.  Expect, at I = 5, training
loss 0.17 and a largest envelope distance near 0.77 in loss.
"""

from pathlib import Path

from dualgap_jax.config import load


def get_config(arg=None):
    config = load(Path(__file__).with_name("cifar_1layer.py"), arg or "")
    config.title = "CIFAR-10, three hidden layers, I = {I}"
    config.branch.hidden = (8, 8, 8)
    config.training.learning_rate = 0.2
    return config
