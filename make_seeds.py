"""Stage 2: seed areas of the training images, from the classifier of stage 1 and the image-level labels.

    python make_seeds.py --run runs/toy-resnet50

Reads classifier.pt. Writes into the run folder: seeds/<id>.png, label maps in VOC's palette; scores/<id>.npz, the scores
of the present classes, from which eval.py --sweep reads; seeds.png, a sheet of photograph | heat map | seed | truth.
Masks are opened for the last column of that sheet alone. Started again, it continues where it stopped.
Next: train_seg.py, or eval.py.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import usage

# Scale 1 is the photograph with its longer side at the size of training. OURS: CNNs, whose training crops enlarge the
# photograph, gain from finer maps (IRN has 0.5 to 2); Transformers stay near the grid that their position embedding knows.
SCALES = {"cnn": (1.0, 1.5, 2.0), "transformer": (0.75, 1.0, 1.25)}
THRESHOLD = 0.4                     # OURS: a round number in the middle; eval.py --sweep tells what others give


class Photographs(Dataset):
    """Image (3, H, W), labels (C,) and the id, for those ids whose seeds are not there yet."""

    def __init__(self, data, ids):
        self.data, self.ids, self.labels = data, ids, data.labels(ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        name = self.ids[index]
        return usage.TO_TENSOR(usage.read_image(self.data.images[name])), self.labels[index], name


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy-resnet50"), help="folder of stage 1 (default runs/toy-resnet50)")
    add("--data", help="where the data lies now, if it has moved since stage 1")
    add("--threshold", type=float, default=THRESHOLD, help=f"a pixel above it is foreground (default {THRESHOLD})")
    add("--scales", type=float, nargs="+", help="default: 1 1.5 2 for CNNs, 0.75 1 1.25 for Transformers")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="add the mirror image (default yes)")
    add("--workers", type=int, default=min(8, usage.CORES), help="processes that load images (default: cores, up to 8)")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA where there is one)")
    args = parser.parse_args()
    if not 0 <= args.threshold <= 1 or not all(0 < scale <= 8 for scale in args.scales or ()):
        raise usage.InputError("--threshold takes 0 to 1, --scales more than 0 and at most 8")
    device, rank, world = usage.start_processes(args.device, args.workers)

    # ---- the classifier and its data
    network, trained = usage.load_classifier(args.run)
    network = network.to(device, memory_format=torch.channels_last).eval()
    scales = args.scales or SCALES["cnn" if trained["backbone"] in usage.CNNS else "transformer"]
    data = usage.VocFolder(args.data or trained["data"])
    usage.check_classes(data, trained["classes"], args.run)
    usage.refuse_truth(args.run / "seeds", data)
    ids = data.split(trained["split"])
    settings = {"threshold": args.threshold, "scales": list(scales), "flip": args.flip, "split": trained["split"],
                "data": str(data.root.resolve()), "classes": data.classes, "classifier": trained}
    if rank == 0:
        usage.record_settings(args.run / "seeds.json", settings, "seeds/ and scores/")
        print(f"{data.root}: seeds of {len(ids)} images of {trained['split']}, threshold {args.threshold} (fixed), into "
              f"{args.run / 'seeds'}")

    # ---- seeds
    todo = [name for name in ids[rank::world] if not (args.run / f"seeds/{name}.png").is_file()]
    if len(todo) < len(ids[rank::world]):
        print(f"{len(ids[rank::world]) - len(todo)} of them are there")
    log = usage.Log(args.run / "seeds.jsonl", len(todo))
    loader = DataLoader(Photographs(data, todo), batch_size=None, num_workers=args.workers)
    for done, (image, labels, name) in enumerate(loader, start=1):
        present = labels.nonzero()[:, 0].to(device)                                 # (K,) the classes of the image
        size = image.shape[-2:]
        base = [side * trained["size"] / max(size) for side in size]
        with usage.fast_autocast(device):
            activations = usage.multi_scale_activations(network, image[None].to(device), base, scales, args.flip)
        activations = [s[:, present] for s in activations]                          # (1, C, h, w) -> (1, K, h, w)
        scores = usage.seed_scores(activations, torch.ones(1, len(present), device=device), size, network.align_corners)
        levels = (255 * scores).round().byte()                                      # (1, K, H, W), kept in 8 bits
        seed = usage.label_map(levels / 255, args.threshold)[0] if len(present) else torch.zeros(size, dtype=torch.long)
        seed = torch.cat([present.new_zeros(1), present + 1])[seed]                 # (H, W), numbers among all classes
        with usage.written(args.run / f"scores/{name}.npz") as temporary:
            np.savez_compressed(temporary, classes=present.cpu().numpy(), levels=levels[0].cpu().numpy())
        usage.save_mask(args.run / f"seeds/{name}.png", seed.cpu())                 # last: its being there means done
        if rank == 0 and (done % 10 == 0 or done == len(todo)):
            print("\r" + log.line(done, images=done), end="  ", flush=True)

    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        usage.save_contact_sheet(args.run / "seeds.png", data, ids, args.run / "seeds", args.run / "scores")
        print(f"\n{args.run / 'seeds.png'} shows some\nnext: python train_seg.py --run {args.run}, or python eval.py "
              f"--run {args.run}")


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again: it continues where it stopped"):
        main()
