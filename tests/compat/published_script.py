"""A script in the style of the paper's package: terms of a folder of images, TEXTSPAN per head, mean-ablation.

``test_published_script.py`` changes its import of the package, nothing else, and runs it.
"""

import argparse
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from prs_hook import hook_prs_logger, replace_with_iterative_removal
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default=None)
    parser.add_argument("--name", default="ViT-B-32")
    parser.add_argument("--dataset", default="images")
    parser.add_argument("--data_path")
    parser.add_argument("--texts")
    parser.add_argument("--output_dir")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--texts_per_head", type=int, default=10)
    parser.add_argument("--num_of_last_layers", type=int, default=4)
    parser.add_argument("--w_ov_rank", type=int, default=80)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def encode(model, tokenizer, texts, device):
    with torch.no_grad():
        return F.normalize(model.encode_text(tokenizer(texts).to(device)), dim=-1)


def main(args):
    out = Path(args.output_dir)
    model, _, preprocess = open_clip.create_model_and_transforms(args.model, pretrained=args.pretrained)
    tokenizer = open_clip.get_tokenizer(args.model)
    model.to(args.device)
    model.eval()
    prs = hook_prs_logger(model, args.device)

    images = ImageFolder(args.data_path, transform=preprocess)
    attention_results, mlp_results, cls_results, labels = [], [], [], []
    for image, label in DataLoader(images, batch_size=args.batch_size, shuffle=False):
        with torch.no_grad():
            prs.reinit()
            representation = model.encode_image(image.to(args.device), attn_method="head", normalize=False)
            attentions, mlps = prs.finalize(representation)
        attentions = attentions.detach().cpu().numpy()  # [b, l, n, h, d]
        attention_results.append(np.sum(attentions, axis=2))
        cls_results.append(np.sum(attentions[:, :, 0], axis=2))
        mlp_results.append(mlps.detach().cpu().numpy())
        labels.append(label.numpy())
    attns, mlps = np.concatenate(attention_results), np.concatenate(mlp_results)
    labels = np.concatenate(labels)

    classes = [f"a photo of a {name}." for name in images.classes]
    classifier = encode(model, tokenizer, classes, args.device).cpu().numpy().T
    lines = Path(args.texts).read_text().splitlines()
    text_features = encode(model, tokenizer, lines, args.device).cpu().numpy()
    np.save(out / f"{args.dataset}_attn_{args.name}.npy", attns)
    np.save(out / f"{args.dataset}_mlp_{args.name}.npy", mlps)
    np.save(out / f"{args.dataset}_cls_attn_{args.name}.npy", np.concatenate(cls_results))
    np.save(out / f"{args.dataset}_classifier_{args.name}.npy", classifier)
    np.save(out / f"{args.dataset}_labels.npy", labels)
    np.save(out / f"{Path(args.texts).stem}_{args.name}.npy", text_features)

    def accuracy(embeddings):
        return float(((embeddings @ classifier).argmax(1) == labels).mean())

    print(f"baseline: {accuracy(attns.sum(axis=(1, 2)) + mlps.sum(axis=1)):.4f}")
    ablated = mlps.mean(axis=0, keepdims=True).sum(axis=1)
    print(f"mean-ablated MLPs: {accuracy(attns.sum(axis=(1, 2)) + ablated):.4f}")

    first = attns.shape[1] - args.num_of_last_layers
    attns[:, :first] = attns[:, :first].mean(axis=0, keepdims=True)
    name = f"{args.dataset}_completeness_{Path(args.texts).stem}_top_{args.texts_per_head}_heads_{args.name}.txt"
    with open(out / name, "w") as file:
        for layer in range(first, attns.shape[1]):
            for head in range(attns.shape[2]):
                replaced, picked = replace_with_iterative_removal(
                    attns[:, layer, head], text_features, lines, args.texts_per_head, args.w_ov_rank, args.device
                )
                attns[:, layer, head] = replaced
                file.write(f"------------------\nLayer {layer}, Head {head}\n------------------\n")
                file.writelines(f"{text}\n" for text in picked)
        replaced = accuracy(attns.sum(axis=(1, 2)) + ablated)
        file.write(f"------------------\nCurrent accuracy: {replaced}")
    print(f"replaced by texts: {replaced:.4f}")


if __name__ == "__main__":
    main(parse())
