"""Your curves beside the figures of the paper's tables 1 and 3.

    python -m extras.published imagenet curves.png runs/imagenet-base/certify_sigma_*.tsv
    python -m extras.published cifar10 curves.png runs/cifar10-transfer/certify_sigma_*.tsv
"""

import itertools
import sys

from certify import one_line_errors, plot, read_curves, refuse, table

PUBLISHED = {                   # certified accuracy in %, best over sigma: DMAE's tables 1 and 3
    "imagenet": ((0.5, 1.0, 1.5, 2.0, 3.0), {
        "RS (Cohen 2019)": (49.0, 37.0, 29.0, 19.0, 12.0),
        "SmoothAdv (Salman 2019)": (54.0, 43.0, 37.0, 27.0, 20.0),                  # [1]
        "Consistency (Jeong & Shin 2020)": (50.0, 44.0, 34.0, 24.0, 17.0),
        "MACER (Zhai 2020)": (57.0, 43.0, 31.0, 25.0, 14.0),                        # [2]
        "Boosting (Horvath 2022)": (57.0, 44.6, 38.4, 28.6, 20.2),
        "SmoothMix (Jeong 2021)": (50.0, 43.0, 38.0, 26.0, 17.0),                   # [3]
        "Diffusion + BEiT (Carlini 2022)": (71.1, 54.3, 38.1, 29.5, 13.1),
        "DMAE ViT-B": (69.6, 57.9, 47.8, 35.4, 22.5),
        "DMAE ViT-L": (73.6, 64.6, 53.7, 41.5, 27.5)}),
    "cifar10": ((0.25, 0.5, 0.75, 1.0), {
        "RS (Cohen 2019)": (61.0, 43.0, 32.0, 23.0),
        "SmoothAdv (Salman 2019)": (74.8, 60.8, 47.0, 37.8),                        # [4]
        "Consistency (Jeong & Shin 2020)": (68.8, 58.1, 48.5, 37.8),
        "MACER (Zhai 2020)": (71.0, 59.0, 46.0, 38.0),                              # [2]
        "Boosting (Horvath 2022)": (70.6, 60.4, 52.4, 38.8),
        "SmoothMix (Jeong 2021)": (67.9, 57.9, 47.7, 37.2),
        "Diffusion (Carlini 2022)": (79.3, 65.5, 48.7, 35.5),
        "DMAE ViT-B": (79.2, 64.6, 47.3, 36.1),
        "DMAE ViT-B, continued": (80.8, 67.1, 49.7, 37.7)}),
}
# Rows of other methods are as the DMAE paper prints them. Where the originals differ, draw no
# conclusion:
# [1] SmoothAdv's own table 1: 56, 45, 38, 28, 20.
# [2] ICLR 2020; the DMAE paper cites it as of 2021.
# [3] 17.0 looks like the value at r = 3.5: logs of SmoothMix have 20.4 at 3.0 and 17.0 at 3.5.
# [4] SmoothAdv's own table 2, with extra data: 80, 62, 52, 38 (pre-trained on ImageNet32), 80, 63,
#     52, 40 (unlabelled images), 81, 63, 52, 37 (both). 74.8 is the accuracy at r = 0 of one of its
#     models without extra data.


def draw(name, picture, files):
    """The files' curves with a mark for each published figure."""
    curves = read_curves(files)
    radii, methods = PUBLISHED[name]
    axis = plot(picture, curves)
    for (method, accuracy), mark in zip(methods.items(), itertools.cycle("os^vDX*Ph")):
        ours = method.startswith("DMAE")
        style = dict(color="crimson") if ours else dict(color="0.6", fillstyle="none")
        axis.plot(radii, accuracy, mark, label=method, **style)
    axis.text(1.01, 0, "marks: as the DMAE paper prints them;\nwhere the originals differ, see "
              "extras/published.py", fontsize=7, transform=axis.transAxes)
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    axis.figure.savefig(picture, dpi=150, bbox_inches="tight", facecolor="white")
    print(table(curves, radii))


def main(argv):
    if len(argv) < 3 or argv[0] not in PUBLISHED:
        refuse(f"python -m extras.published {'|'.join(PUBLISHED)} PICTURE TSV ...")
    draw(argv[0], argv[1], argv[2:])


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
