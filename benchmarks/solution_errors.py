"""Errors of the solutions of a teacher's flow from which a flow map learns, by their number of nodes.

    python benchmarks/solution_errors.py --teacher shared/fixtures/digits_vp.pth --nodes 12 16 24

Half of the solutions start at validation digits and half at noise. Each is compared with that of 96 nodes from the same
start: the root mean square of the difference of the last states y (`flowmaps.angle`), and the mean difference of the
integrated divergence, in nats per dimension. Solutions that fail are counted and left out.
"""

import argparse
from pathlib import Path

import torch

import scoresde as ss
from scoresde.dequantization import DataMap, Uniform
from scoresde.flowmaps import TrajectoryDistillation
from scoresde.flowmaps.trajectory_distillation import Trajectories
from scoresde.losses import Drawn
from scoresde.networks import MLP
from scoresde.random_stream import RandomStream

FINE = 96


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint of the digits in score_sde's format")
    parser.add_argument("--nodes", type=int, nargs="+", default=[12, 16, 24])
    parser.add_argument("--count", type=int, default=64)
    options = parser.parse_args()
    run, digits = ss.convert.score_sde(options.teacher), ss.data.Digits("validation")
    path_of = ss.FlowMap(MLP(run.config.data.shape, width=8, out_channels=2), run.model.sde, data_scale=0.8)
    images = torch.stack([digits[i] for i in range(options.count)])

    def solved(nodes: int) -> Trajectories:
        stream = RandomStream(seeds=range(options.count))
        x0 = DataMap(run.transform, Uniform()).training_states(images, stream).float()
        drawn = Drawn(x0, torch.ones(len(x0), dtype=torch.float64), stream.normal(x0), stream)
        return TrajectoryDistillation(run.model, nodes).solve(path_of, drawn)

    fine = solved(FINE)
    from_data = fine.t[0] < fine.t[-1]
    print("| nodes | start | fail | rms error of the end | mean error of the divergence |")
    print("| --- | --- | --- | --- | --- |")
    for nodes in options.nodes:
        coarse = solved(nodes)
        for name, chosen in (("data", from_data), ("noise", ~from_data)):
            kept = chosen & coarse.is_solved & fine.is_solved
            error = float((coarse.y[-1] - fine.y[-1])[kept].square().mean().sqrt())
            divergence = float((coarse.integral[-1] - fine.integral[-1])[kept].mean())
            failed = int((chosen & ~coarse.is_solved).sum())
            print(
                f"| {nodes} | {name} | {failed} of {int(chosen.sum())} | {error:.3f} | {divergence:+.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
