"""Drawing for the notebooks: what is plotted is computed on the page, how it looks stands here."""

import inspect

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Code, display
from matplotlib.patches import Rectangle
from scipy.stats import norm

# Okabe and Ito's colours, which can be told apart by everybody.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "0.5"

plt.rcParams.update({
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "figure.dpi": 85,
    "figure.constrained_layout.use": True,
})


def show(*things):
    """The source of functions and classes, as it stands in the scripts."""
    for thing in things:
        display(Code(inspect.getsource(thing), language="python"))


# --------------------------------------------------------------------------------------------------
# Notebook 01
# --------------------------------------------------------------------------------------------------

STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))


def draw_lines(axis, x, curves, **how):
    """The curves {label: values over x}, each in a colour and a style of its own."""
    for (label, curve), (colour, style) in zip(curves.items(), STYLES, strict=False):
        axis.plot(x, curve, style, color=colour, label=label, **how)
    axis.legend()


def draw_images(axes, images, titles):
    """Grey images (H, W) in [0, 1], each with its title."""
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=title)


def picture_of_garment(images, titles):
    """An image, a perturbation, and their sum: grey images (H, W) with their titles."""
    _, axes = plt.subplots(1, 3, figsize=(8, 3))
    draw_images(axes, images, titles)
    plt.show()


def picture_of_plane(regions, cloud, discs, sigma):
    """Classes of f and of g on a grid of [-2, 2]^2; a cloud of noisy copies, and certified discs.

    regions: (answers of f, answers of g), each (side, side); cloud: (point, its copies (n, 2));
    discs: [(point, radius), ...].
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.1), sharey=True)
    tints = plt.matplotlib.colors.ListedColormap(["#a6cfe6", "#f3c5a3", "#a3dccb"])
    how = dict(origin="lower", extent=(-2, 2, -2, 2), cmap=tints, vmin=0, vmax=2)
    titles = "base classifier f", f"smoothed classifier g, $\\sigma$ = {sigma}"
    for axis, answers, title in zip(axes, regions, titles, strict=True):
        axis.imshow(answers, aspect="equal", interpolation="nearest", **how)
        axis.set(xlabel="first pixel", title=title, xlim=(-2, 2), ylim=(-2, 2))
        axis.set(xticks=range(-2, 3), yticks=range(-2, 3))
        axis.grid(False)
        for c, place in enumerate(((-1.9, -1.85), (1.15, -1.85), (-1.9, 1.75))):
            axis.text(*place, f"class {c}", fontsize=9)
    axes[0].set_ylabel("second pixel")
    white = dict(color="white", markeredgecolor="black")
    point, copies = cloud
    axes[0].plot(*copies.T, ".", color="0.15", markersize=3, label=f"x + e, {len(copies)} draws")
    axes[0].plot(*point, "o", markersize=7, label="x", **white)
    axes[0].legend(loc="upper right", framealpha=1)
    for point, radius in discs:
        axes[1].add_patch(plt.Circle(point, radius, fill=False, color="black", linewidth=1.5))
        axes[1].plot(*point, "o", markersize=5, **white)
    plt.show()


def picture_of_worst_region(psi, edge, centres):
    """psi: share of each cell of [-4, 4]^2 in the region; edge: ends of the line of the lemma.

    centres: x and x + delta.
    """
    _, axis = plt.subplots(figsize=(4.9, 4.3))
    tints = plt.matplotlib.colors.LinearSegmentedColormap.from_list("", ["white", "#7fb8da"])
    how = dict(origin="lower", extent=(-4, 4, -4, 4), cmap=tints, vmin=0, vmax=1)
    picture = axis.imshow(psi, **how)
    label = r"$\langle\delta, z-x\rangle = \|\delta\|\,\Phi^{-1}(p_A)$"
    axis.plot(*edge, color=ORANGE, label=label)
    looks = ("black", "$x$", "right", -0.2), (ORANGE, r"$x+\delta$", "left", 0.2)
    for centre, (colour, name, side, aside) in zip(centres, looks, strict=True):
        axis.plot(*centre, "o", color=colour)
        axis.text(centre[0] + aside, centre[1] + 0.1, name, ha=side)
        axis.add_patch(plt.Circle(centre, 1, fill=False, color=colour, linestyle=":"))
    axis.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), title="worst region A, by linear programming")
    axis.set(xlabel="first pixel ($\\sigma$)", ylabel="second pixel ($\\sigma$)")
    axis.grid(False)
    axis.legend(loc="lower left", framealpha=1)
    plt.colorbar(picture, label=r"$\psi$: share of the cell in A", shrink=0.85)
    plt.show()


def picture_of_shares(p0, lower, upper, regions):
    """Shares at x + delta over shares at x: of regions {name: (before, after)}, and (1.4)."""
    _, axis = plt.subplots(figsize=(7.2, 4.2))
    axis.fill_between(p0, lower, upper, color="0.9", label="what (1.4) allows")
    for (name, shares), colour, mark in zip(
        regions.items(), (BLUE, GREEN, PURPLE), "osv", strict=True
    ):
        axis.plot(*shares, mark, color=colour, markersize=4, label=name)
    axis.plot(p0, lower, color=ORANGE, label="half-space, moving out of it")
    axis.plot(p0, upper, "--", color=ORANGE, label="half-space, moving into it")
    axis.set(xlabel="share of the region at $x$", xlim=(0, 1), ylim=(0, 1))
    axis.set(ylabel=r"share of the region at $x + \delta$, $\|\delta\| = \sigma$")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    plt.show()


def picture_of_profiles(line, profiles, sigma):
    """Along a line of the plane: {name: (scores of class 0, the same smoothed, on Phi^-1)}."""
    _, axes = plt.subplots(1, 2, figsize=(8.6, 3.5))
    for (name, (scores, smooth, lipschitz)), (colour, style) in zip(
        profiles.items(), STYLES, strict=False
    ):
        axes[0].plot(line, scores, color=colour, linewidth=1)
        axes[0].plot(line, smooth, style, color=colour, linewidth=2, label=f"{name}, smoothed")
        axes[1].plot(line, lipschitz, style, color=colour, linewidth=2, label=name)
    axes[1].plot(line, -line, color=GREY, linewidth=1, label="slope $-1$")
    axes[0].set(ylabel="class 0: base (thin) and $p_0$ (thick)")
    axes[1].set(ylabel=rf"$\sigma\,\Phi^{{-1}}(p_0)$, $\sigma$ = {sigma}", ylim=(-1.2, 1.2))
    for axis in axes:
        axis.set(xlabel="first pixel (second: $-0.67$)", xlim=(-2, 2))
        axis.legend()
    plt.show()


def picture_of_tightness(t, shares, radius):
    """Shares (classes, way) of A, of the strip's classes and of B on the way t, and (1.6)."""
    _, axis = plt.subplots(figsize=(5.4, 3.6))
    axis.plot(t, shares[0], color=BLUE)
    axis.plot(t, shares[-1], color=ORANGE, linestyle="--")
    axis.plot(t, shares[1:-1].T, color=GREY, linestyle=":")
    axis.text(0.03, 0.56, "A", color=BLUE)
    axis.text(0.1, 0.31, "B", color=ORANGE)
    axis.text(0.05, 0.08, "two classes of the strip", color=GREY)
    axis.axvline(radius, color="black", linewidth=1)
    axis.text(radius + 0.01, 0.62, "R of (1.6)")
    axis.set(xlabel="way $t$ along $v$ (pixels in [0, 1])", xlim=(0, 0.8), ylim=(0, 0.7))
    axis.set(ylabel="share of the noisy copies")
    plt.show()


def picture_of_closest_pair(images, labels, apart, sigmas, limits):
    """Two images (H, W); beside them (1.10) over sigma: {name of the pair: limit}."""
    _, axes = plt.subplots(1, 3, figsize=(8.6, 3.5), width_ratios=(1, 1, 3.4))
    draw_images(axes[:2], images, [f"a {label}" for label in labels])
    axes[0].set_xlabel("the closest pair:")
    axes[1].set_xlabel(f"{apart:.2f} apart")
    draw_lines(axes[2], sigmas, {name: 100 * limit for name, limit in limits.items()})
    ticks = [0.05, 0.1, 0.25, 0.5, 1, 2, 4]
    axes[2].set(xscale="log", xticks=ticks, xticklabels=map(str, ticks), ylim=(50, 101))
    axes[2].set(xlabel=r"noise $\sigma$ (pixels in [0, 1])")
    axes[2].set(ylabel="accuracy on the two noisy images (%)")
    axes[2].set_title("(1.10): an upper bound for one pair of images")
    axes[2].minorticks_off()
    plt.show()


def picture_of_balls(scaled, exact, provable):
    """Radii over sigma sqrt(d) / Delta: {d: exact}, {d: provable}."""
    _, axes = plt.subplots(1, 2, figsize=(8.6, 3.7))
    draw_lines(axes[0], scaled, {f"d = {d}": curve for d, curve in exact.items()}, linewidth=2)
    draw_lines(axes[1], scaled, {f"d = {d}": curve for d, curve in provable.items()}, linewidth=2)
    axes[1].get_legend().remove()
    for axis, title in zip(axes, ("exact shares", "provable with 100 000 draws"), strict=True):
        axis.set(xlabel=r"$\sigma \sqrt{d}\, /\, \Delta$", ylabel=r"radius $R / \Delta$")
        axis.set_title(title)
    axes[0].set(ylim=(0, 1.02))
    axes[1].set(yscale="log", ylim=(0.001, 1.2))
    plt.show()


def picture_of_trade(radii, curves):
    """Certified accuracy over the radius: {label: shares}."""
    _, axis = plt.subplots(figsize=(5.8, 3.8))
    draw_lines(axis, radii, {label: 100 * curve for label, curve in curves.items()})
    axis.set(xlabel=r"certified $\ell_2$ radius (pixels in [0, 1])", xlim=(0, radii[-1]))
    axis.set(ylabel="certified accuracy (%)", ylim=(0, 101))
    plt.show()


def picture_of_robustness(sizes, networks):
    """{title: (f under attack, g under attack, g proven)}, shares over the size."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.8), sharey=True)
    for axis, (title, (f, g, proven)) in zip(axes, networks.items(), strict=True):
        axis.fill_between(sizes, 100 * proven, 100 * g, color="0.93")
        axis.plot(sizes, 100 * f, "--", color=ORANGE, label="f under attack: an upper bound")
        axis.plot(sizes, 100 * g, "-.", color=GREEN, label="g under attack: an upper bound")
        axis.plot(sizes, 100 * proven, color=BLUE, label="g, proven: a lower bound")
        axis.set(title=title, xlim=(0, sizes[-1]), ylim=(0, 101))
        axis.set(xlabel=r"size of the perturbation $\|\delta\|$ (pixels in [0, 1])")
    axes[0].set_ylabel("accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    plt.show()


def picture_of_resizes(radii, distance):
    """Certified radii {name: radius} of a small image as bars, and the true distance."""
    _, axis = plt.subplots(figsize=(6.6, 2.4))
    names = [*radii][::-1]
    values = [radii[name] for name in names]
    axis.barh(names, values, color=(GREEN, ORANGE, BLUE), height=0.55)
    axis.axvline(distance, color="black")
    axis.text(distance + 0.03, -0.35, "true distance", va="bottom")
    axis.set(xlabel=r"certified $\ell_2$ radius of the 32 × 32 image (pixels in [0, 1])")
    axis.grid(axis="y", visible=False)
    plt.show()


# --------------------------------------------------------------------------------------------------
# Notebook 02
# --------------------------------------------------------------------------------------------------


def with_spaces(number):
    """12345 as 12 345."""
    return f"{number:,}".replace(",", " ")


def picture_of_counts(images, titles, counts, top):
    """An image and a noisy copy (H, W); beside them the counts of f's answers, `top` in orange."""
    _, axes = plt.subplots(1, 3, figsize=(8.6, 2.8), width_ratios=(1, 1, 2))
    draw_images(axes[:2], images, titles)
    classes = range(len(counts))
    axes[2].bar(classes, counts, color=[ORANGE if c == top else BLUE for c in classes])
    axes[2].set(xlabel="answer of f", ylabel=f"noisy copies, of {sum(counts)}", xticks=classes)
    axes[2].grid(axis="x", visible=False)
    plt.show()


def picture_of_errors(p, errors):
    """Chance of error / alpha over the true share: {n: {name of the bound: its errors / alpha}}."""
    looks = {"Wilson": (ORANGE, 0.8), "Clopper-Pearson": (BLUE, 0.8), "Hoeffding": (GREEN, 1.2)}
    figure, axes = plt.subplots(1, len(errors), figsize=(9.4, 3.6), sharey=True)
    for axis, (n, of_bounds) in zip(axes, errors.items(), strict=True):
        for name, (colour, width) in looks.items():
            error = of_bounds[name].clip(1e-6)
            axis.semilogy(p, error, color=colour, linewidth=width, label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xlabel="true share $p$", title=f"n = {n}", ylim=(1e-3, 300))
        axis.set(xscale="logit", xlim=(1e-5, 0.9999), xticks=(1e-4, 1e-2, 0.5, 0.99))
        axis.set(xticklabels=("0.0001", "0.01", "0.5", "0.99"))
        axis.minorticks_off()
    axes[0].set_ylabel(r"chance of error / $\alpha$ (allowed: 1)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    plt.show()


def picture_of_proven(true, proven):
    """Proven over true radius in sigma: {(name of the bound, n): radii}."""
    _, axis = plt.subplots(figsize=(5.6, 3.8))
    axis.plot(true, true, color="black", linewidth=1, label="exact $p$")
    for (name, n), radii in proven.items():
        colour = BLUE if name == "Clopper-Pearson" else GREEN
        style = ":" if n == min(draws for _, draws in proven) else "-"
        axis.plot(true, radii, style, color=colour, label=f"{name}, n = {with_spaces(n)}")
    axis.set(xlabel=r"true radius $\Phi^{-1}(p)$ ($\sigma$)", ylabel=r"proven radius ($\sigma$)")
    axis.legend()
    plt.show()


def picture_of_abstentions(p, chances):
    """The chance to abstain over the true share: {n: chances}."""
    _, axis = plt.subplots(figsize=(5.6, 3.6))
    draw_lines(axis, p, {f"n = {with_spaces(n)}": 100 * chance for n, chance in chances.items()})
    axis.set(xlabel="true share $p$", ylabel="chance to abstain (%)")
    axis.set(xlim=(0.5, 0.7), ylim=(0, 101))
    plt.show()


def picture_of_caps(n, caps, approximation):
    """The largest provable radius over the draws: {sigma: caps}, and (2.7)'s approximation."""
    _, axis = plt.subplots(figsize=(5.8, 3.8))
    axis.plot(n, approximation, color=GREY, linewidth=1, label=r"approximation, $\sigma$ = 1")
    draw_lines(axis, n, {rf"$\sigma$ = {sigma}": curve for sigma, curve in caps.items()})
    for draws in (10_000, 100_000):
        axis.axvline(draws, color=GREY, linestyle=":", linewidth=1)
    axis.text(10_000, 0.05, "ImageNet\nin the paper", ha="right", fontsize=9)
    axis.text(100_000, 0.05, " usual", fontsize=9)
    axis.set(xscale="log", xlabel="draws n", ylim=(0, 5.5))
    axis.set(ylabel=r"largest provable $\ell_2$ radius (pixels in [0, 1])")
    axis.legend(loc="upper left")
    plt.show()


def picture_of_choices(share, false, tries, best, wrong, n, level):
    """What choosing costs, in three panels.

    false: {name: chance of a false certificate over the share}; best: (simulated, exact) chance of
    a false bound over the tries; wrong: {n0: chance of a wrong choice over the share}.
    """
    _, axes = plt.subplots(1, 3, figsize=(9.6, 3.5))
    setting = f"n = {n}, α = {100 * level:g} %"
    (fresh, first), (reused, second) = false.items()
    axes[0].plot(share, 100 * second, "--", color=ORANGE, label=reused)
    axes[0].plot(share, 100 * first, color=BLUE, label=fresh)
    axes[0].set(ylabel="false certificates (%)", ylim=(0, 11), title=f"selection, {setting}")

    simulated, exact = best
    axes[1].semilogx(tries, 100 * simulated, "o", color=ORANGE, label="simulated")
    axes[1].semilogx(tries, 100 * exact, color=ORANGE, label="(2.9)")
    axes[1].set(xlabel="tries, of which the best is kept", ylabel="false bounds (%)")
    axes[1].set(ylim=(0, 100), title=f"best of t, {setting}", xticks=tries, xticklabels=tries)
    axes[1].minorticks_off()

    chances = {f"$n_0$ = {n0}": chance.clip(1e-12) for n0, chance in wrong.items()}
    draw_lines(axes[2], share, chances)
    axes[2].set(yscale="log", ylabel="chance of a wrong choice", ylim=(1e-6, 1))
    axes[2].set(title="selection rarely errs")
    for axis in axes[:2]:
        axis.axhline(100 * level, color="black", linewidth=1)
        axis.legend()
    for axis in axes[::2]:
        axis.set(xlabel="true share of class 0", xlim=(0.5, 0.7))
    plt.show()


def picture_of_excess(M, subtracted, alpha, points):
    """Accuracy to subtract over the number of images, in %, and points {images: the same}."""
    _, axis = plt.subplots(figsize=(5.6, 3.6))
    axis.loglog(M, subtracted, color=BLUE, label=r"$q/M$, $\rho = 0.001$: exact")
    axis.axhline(100 * alpha, color="black", linestyle=":", label=r"mean, $\alpha$")
    for images, lost in points.items():
        axis.plot(images, lost, "o", color=ORANGE)
        line = dict(arrowstyle="-", color=GREY, linewidth=0.8, shrinkB=4)
        how = dict(xytext=(0, 22), textcoords="offset points", arrowprops=line)
        axis.annotate(f"{with_spaces(images)} images: {lost:.2f} %", (images, lost), **how)
    axis.set(xlabel="images M", ylabel="accuracy to subtract (%)")
    axis.set(ylim=(50 * alpha, 20_000 * alpha), xlim=(15, 600_000))
    axis.legend()
    plt.show()


def picture_of_two_errors(share, errors):
    """Chance of error / alpha of pairs of bounds over the share of A: {name: errors / alpha}."""
    _, axis = plt.subplots(figsize=(6.4, 3.4))
    for (name, error), colour in zip(errors.items(), (ORANGE, GREEN, BLUE, PURPLE), strict=True):
        axis.plot(share, error, color=colour, linewidth=0.9, label=name)
    axis.legend()
    axis.axhline(1, color="black", linewidth=1)
    axis.set(xlabel="true share of A, three classes, n = 40", ylabel="chance of error / α")
    axis.set(ylim=(0, 2.5), xlim=(0, 1))
    plt.show()


def picture_of_the_plane_of_bounds(points, levels):
    """Pairs of bounds on the scale of Phi^-1: {sigma: {state: [(p_a, p_b), ...]}}.

    levels: radii whose level lines are drawn, of both kinds.
    """
    looks = (BLUE, "o"), (GREEN, "D"), (ORANGE, "X")
    figure, axes = plt.subplots(1, len(points), figsize=(9.4, 4.3), sharey=True)
    ticks = np.array([0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99])
    for axis, (sigma, states) in zip(axes, points.items(), strict=True):
        for level in levels:
            corner = level / sigma                             # where the radii agree
            names = ("level lines, two-sided", "level lines, one-sided") if level == 0 else ("", "")
            axis.plot([corner - 5, corner], [-corner - 5, -corner], color="black", linewidth=1,
                      label=names[0])
            axis.plot([corner, corner], [-5, -corner], "--", color=GREY, linewidth=1,
                      label=names[1])
            axis.annotate(f"R = {level:g}", (corner, -corner), xytext=(4, 2), fontsize=9,
                          textcoords="offset points")
        axis.fill_between([-3, 3], [3, -3], 3, color="0.9")
        axis.text(0.9, 0.35, "$p_B > 1 - p_A$:\nimpossible", fontsize=9)
        for (name, pairs), (colour, mark) in zip(states.items(), looks, strict=True):
            if pairs:
                p_a, p_b = norm.ppf(np.array(pairs)).T
                axis.plot(p_a, p_b, mark, color=colour, markersize=5, zorder=3, label=name)
        axis.set(xlim=(-2.1, 2.6), ylim=(-2.6, 1.0), title=rf"$\sigma$ = {sigma:g}")
        axis.set(xlabel="$p_A$, at least", xticks=norm.ppf(ticks[1:]), xticklabels=ticks[1:])
        axis.set(yticks=norm.ppf(ticks[:5]), yticklabels=ticks[:5])
    axes[0].set_ylabel("$p_B$, at most")
    handles = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[name] = handle
    where = dict(loc="outside upper center", ncols=5, fontsize=8.5)
    figure.legend(handles.values(), handles.keys(), **where)
    plt.show()


def picture_of_a_pair(images, titles, shares, top, rival, p_a, p_b):
    """An image and a noisy copy (H, W); the shares of f's answers, and the bounds of both sides."""
    _, axes = plt.subplots(1, 3, figsize=(8.6, 2.9), width_ratios=(1, 1, 2))
    draw_images(axes[:2], images, titles)
    colours = {top: GREEN, rival: PURPLE}
    classes = range(len(shares))
    axes[2].bar(classes, shares, color=[colours.get(c, "0.7") for c in classes])
    axes[2].axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes[2].text(9.5, 0.51, "asked by one-sided", ha="right", va="bottom", fontsize=8)
    for bound, colour, words in ((p_a, GREEN, "$p_A \\geq$"), (p_b, PURPLE, "$p_B \\leq$")):
        axes[2].axhline(bound, color=colour, linewidth=1)
        axes[2].text(-0.4, bound + 0.01, f"{words} {bound:.3f}", fontsize=9)
    axes[2].set(xlabel="answer of f", ylabel="share of the copies", xticks=classes)
    axes[2].set(ylim=(0, 0.58))
    axes[2].grid(axis="x", visible=False)
    plt.show()


def picture_of_gain(part, gains):
    """Radius gained by the second side over the strongest rival's part: {share of A: gains}."""
    _, axis = plt.subplots(figsize=(5.8, 3.4))
    draw_lines(axis, part, {f"$k_A/n$ = {p}": gain for p, gain in gains.items()})
    axis.axhline(0, color="black", linewidth=1)
    axis.set(xlabel="share of the strongest rival in what A lost (K = 10)")
    axis.set(ylabel=r"radius gained ($\sigma$), n = 10 000")
    plt.show()


def picture_of_split(parts, two, one):
    """ACR over the part of alpha for the top class, and minus its value at 0.9.

    two: {name of a log: two-sided ACR over the parts}; one: {the same: one-sided ACR}.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4))
    at = np.abs(parts - 0.9).argmin()
    for (name, acr), (colour, _), width in zip(two.items(), STYLES, (3, 1.5, 1.5, 1.5), strict=True):
        axes[0].plot(parts, acr, color=colour, linewidth=width, label=name)
        axes[1].plot(parts, 1000 * (acr - acr[at]), color=colour)
        axes[0].axhline(one[name], color=colour, linestyle="--", linewidth=1)
        axes[1].axhline(1000 * (one[name] - acr[at]), color=colour, linestyle="--", linewidth=1)
    axes[0].set(ylabel="ACR (dashed: one-sided)", ylim=(0, None))
    axes[1].set_ylabel("ACR minus ACR at 0.9, in thousandths\n(dashed: one-sided)")
    axes[1].set(ylim=(-17.5, 4))
    for axis in axes:
        axis.axvline(0.9, color="black", linestyle=":", linewidth=1)
        axis.set(xlabel=r"$\tau$, the top class's part of $\alpha$", xlim=(0, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    plt.show()


# --------------------------------------------------------------------------------------------------
# Notebook 03
# --------------------------------------------------------------------------------------------------


def draw_method(images, name, shapes, dropped, sigma, loss, depths):
    """The way of a digit through the autoencoder, from left to right, with the shapes on it.

    images {clean, noise, noisy, masked, restored: (1, 1, 8, 8)}, its name, shapes {kept, latent,
    all: (tokens, width)}, which patches are dropped, sigma, the loss, the blocks of both halves.
    """
    side, middle, height = 2.4, 2.5, 0.26
    grid = round(len(dropped) ** 0.5)
    pixels = (images["clean"].shape[-1] // grid) ** 2
    kept = len(dropped) - sum(dropped)
    _, axis = plt.subplots(figsize=(10.5, 4.1))
    axis.set(xlim=(-0.2, 22.2), ylim=(-1.9, 6.9), aspect="equal")
    axis.axis("off")

    def size(shape):
        return " × ".join(map(str, shape))

    def picture(left, which, title, middle=middle, low=0.0, high=1.0):
        extent = left, left + side, middle - side / 2, middle + side / 2
        axis.imshow(images[which][0, 0], cmap="gray", vmin=low, vmax=high, aspect="equal",
                    interpolation="nearest", extent=extent)
        axis.text(left + side / 2, middle - side / 2 - 0.15, title, ha="center", va="top",
                  fontsize=8.5)

    def column(left, colours, title):
        """A sequence of tokens, the class token on top."""
        top = middle + height * len(colours) / 2
        for place, colour in enumerate(colours):
            corner = left, top - height * (place + 1)
            axis.add_patch(Rectangle(corner, 0.5, height, facecolor=colour, edgecolor="white"))
        axis.text(left + 0.25, top - height * len(colours) - 0.12, title, ha="center", va="top",
                  fontsize=8.5)

    def box(left, text):
        axis.add_patch(Rectangle((left, middle - 1.5), 1.9, 3, facecolor="0.93", edgecolor="0.3"))
        axis.text(left + 0.95, middle, text, ha="center", va="center", fontsize=9)

    def arrow(start, end):
        how = dict(arrowstyle="->", color="0.2", shrinkA=0, shrinkB=0)
        axis.annotate("", xytext=start, xy=end, arrowprops=how)

    shape = size(images["clean"].shape[1:])
    picture(0, "clean", f"clean $x$ ({name})\n{shape}", middle=4.1)
    picture(0, "noise", f"noise $e / \\sigma$\n{shape}", middle=0.3, low=-3, high=3)
    arrow((side + 0.1, 3.6), (3.4, 2.8))
    arrow((side + 0.1, 0.9), (3.4, 2.1))
    picture(3.5, "noisy", f"noisy $\\tilde{{x}} = x + e$\n$\\sigma$ = {sigma}")
    picture(6.8, "masked", f"{kept} of {len(dropped)} patches kept\n"
                           f"{len(dropped)} × {pixels} → {kept} × {pixels}")
    low, high = middle - side / 2, middle + side / 2
    for line in range(1, grid):
        place = line * side / grid
        axis.plot((6.8 + place, 6.8 + place), (low, high), color=ORANGE, linewidth=1)
        axis.plot((6.8, 6.8 + side), (low + place, low + place), color=ORANGE, linewidth=1)
    tokens = [PURPLE] + [BLUE] * kept
    column(10.0, tokens, f"tokens\n{size(shapes['kept'])}")
    box(11.2, f"encoder\n{depths[0]} blocks")
    column(13.9, tokens, f"latent\n{size(shapes['latent'])}")
    column(15.8, [PURPLE] + [GREY if gone else BLUE for gone in dropped],
           f"in image order\n{size(shapes['all'])}")
    box(17.0, f"decoder\n{depths[1]} block")
    picture(19.6, "restored", f"prediction $\\hat{{x}}$\n{len(dropped)} × {pixels}")
    for start, end in ((6.0, 6.7), (9.3, 9.9), (10.6, 11.1), (13.2, 13.7), (14.5, 15.7),
                       (16.4, 16.9), (19.0, 19.5)):
        arrow((start, middle), (end, middle))

    arrow((side + 0.1, 6.2), (18.9, 6.2))
    axis.plot((side / 2, side / 2, side + 0.2), (5.4, 6.2, 6.2), color="0.2", linewidth=1)
    arrow((20.8, middle + side / 2 + 0.1), (20.8, 5.5))
    axis.text(20.8, 6.2, f"loss\nall {len(dropped)} patches:\n{loss:.3f}", ha="center",
              va="center", fontsize=9)
    axis.text(10.3, 6.35, "the clean image is the target", ha="center", va="bottom", fontsize=9)
    legend = (11.0, PURPLE, "class token"), (13.4, BLUE, "kept patch"), (15.7, GREY, "mask token")
    for left, colour, text in legend:
        axis.add_patch(Rectangle((left, -1.75), 0.3, 0.3, facecolor=colour))
        axis.text(left + 0.4, -1.6, text, va="center", fontsize=8.5)
    plt.show()


def draw_lengths(distances, densities):
    """Histogram of distances between digits; {sigma: (lengths, density)} of the noise."""
    _, axis = plt.subplots(figsize=(7, 3))
    axis.hist(distances, np.linspace(0, 10, 121), density=True, color="0.7")
    axis.annotate("way to the nearest digit\nof another class", (2.1, 1.0), (2.9, 2.2),
                  arrowprops=dict(arrowstyle="-", color=GREY))
    colours = BLUE, ORANGE, GREEN, PURPLE
    for (sigma, (length, density)), colour in zip(densities.items(), colours, strict=True):
        axis.plot(length, density, color=colour)
        axis.text(length[density.argmax()], density.max() + 0.1, rf"noise, $\sigma$ = {sigma:g}",
                  color=colour, ha="center")
    axis.set(xlabel=r"$\ell_2$ length (pixels in [0, 1])", ylabel="probability density",
             xlim=(0, 10), ylim=(0, 5.2))
    plt.show()


def draw_positions(table, similarities):
    """The table (N, D) of positions; {(row, column): (side, side)} cosine similarities to one."""
    figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.9), width_ratios=(1.9, 1, 1, 1))
    shown = axes[0].imshow(table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto",
                           interpolation="nearest")
    axes[0].set(xlabel="channel", ylabel="patch (row by row)", title="the table pos$(a, b)$",
                xticks=range(0, table.shape[1], table.shape[1] // 4))
    figure.colorbar(shown, ax=axes[0], label="value")
    for axis, (place, similarity) in zip(axes[1:], similarities.items(), strict=True):
        shown = axis.imshow(similarity, cmap="viridis", vmin=0.6, vmax=1, interpolation="nearest")
        axis.plot(*place[::-1], "o", color=ORANGE, markersize=5)
        axis.set(title=f"similarity with\n{place}", xlabel="column", xticks=(0, 5, 10),
                 yticks=(0, 5, 10))
    axes[1].set_ylabel("row")
    figure.colorbar(shown, ax=axes[3], label="cosine similarity", shrink=0.7)
    for axis in axes:
        axis.grid(False)
    plt.show()


def draw_masking(images, P):
    """{title: image (H, W)}; orange lines between patches of side P on all but the first two."""
    _, axes = plt.subplots(1, len(images), figsize=(8.5, 2.4))
    for axis, (title, image) in zip(axes, images.items(), strict=True):
        draw_digit(axis, image, title)
    for axis in axes[2:]:
        for line in np.arange(P, image.shape[-1], P) - 0.5:
            axis.axhline(line, color=ORANGE, linewidth=1)
            axis.axvline(line, color=ORANGE, linewidth=1)
    plt.show()


def draw_attention(maps, patch):
    """{(head, block): weights (rows, columns)} of all heads, and the patch (row, column) asking."""
    heads, blocks = (1 + max(place[axis] for place in maps) for axis in (0, 1))
    figure, axes = plt.subplots(heads, blocks, figsize=(6, 4.3))
    top = max(float(weights.max()) for weights in maps.values())
    for (head, block), weights in maps.items():
        axis = axes[head, block]
        shown = axis.imshow(weights, cmap="viridis", vmin=0, vmax=top)
        axis.plot(*patch[::-1], "o", color=ORANGE, markersize=6)
        axis.set(xticks=range(4), yticks=range(4), title=f"block {block + 1}, head {head + 1}")
        axis.grid(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("row")
    for axis in axes[-1]:
        axis.set_xlabel("column")
    figure.colorbar(shown, ax=axes, label="mean attention weight", shrink=0.7)
    plt.show()


def draw_flops(gammas, flops):
    """GFLOP (mask ratios, 2) of encoder and decoder, one on the other."""
    _, axis = plt.subplots(figsize=(6.2, 3))
    axis.fill_between(gammas, 0, flops[:, 0], color=BLUE, linewidth=0)
    axis.fill_between(gammas, flops[:, 0], flops.sum(1), color=ORANGE, linewidth=0)
    axis.text(0.12, 14, "encoder, on kept patches", color="white")
    axis.text(0.12, 34.5, "decoder, on all patches", color="white", rotation=-16,
              rotation_mode="anchor")
    axis.plot((0.75, 0.75), (0, 30), "--", color="0.2")
    axis.text(0.75, 31, "the paper's ratio", ha="center", va="bottom")
    axis.set(xlabel=r"mask ratio $\gamma$", ylabel="forward pass, one image\n(GFLOP)",
             xlim=(0, 0.875), ylim=(0, 48))
    plt.show()


def draw_two_tasks(sigmas, kept, dropped, copying, mean_image, trained):
    """Both parts of the loss over sigma, and two answers without a network; a line at `trained`."""
    _, axis = plt.subplots(figsize=(6.8, 3.3))
    axis.plot(sigmas, dropped, "s-", color=ORANGE, markersize=4)
    axis.plot(sigmas, kept, "o-", color=BLUE, markersize=4)
    axis.plot(sigmas, copying, ":", color="0.2")
    axis.axhline(mean_image, color=GREY, linestyle="--")
    axis.axvline(trained, color="0.8", zorder=0)
    axis.text(0.01, 0.16, "dropped patches\n(predict)", color=ORANGE)
    axis.text(0.4, 0.12, "kept patches (denoise)", color=BLUE)
    axis.text(0.375, 0.86, "copy the noisy pixels", color="0.2")
    axis.text(0.01, mean_image + 0.02, "answer with the mean image", color=GREY)
    axis.set(xlabel=r"noise level $\sigma$ (pixels in [0, 1]); trained at the grey line",
             ylabel="mean squared error\n(normalised pixels)", xlim=(0, 0.6), ylim=(0, 0.95))
    plt.show()


def draw_reconstructions(inputs, answers, trained, title):
    """{(sigma, mask ratio): image (H, W)} twice; what was trained at is framed."""
    figure = plt.figure(figsize=(9.5, 5.6))
    sigmas, gammas = (sorted({key[place] for key in inputs}) for place in (0, 1))
    halves = figure.subfigures(1, 2, wspace=0.03)
    parts = (inputs, "what the encoder gets"), (answers, "what the decoder answers")
    for half, (images, subtitle) in zip(halves, parts, strict=True):
        axes = half.subplots(len(sigmas), len(gammas))
        for (sigma, gamma), image in images.items():
            axis = axes[sigmas.index(sigma), gammas.index(gamma)]
            draw_digit(axis, image, f"{gamma:.0%} dropped" if sigma == sigmas[0] else "")
            if gamma == gammas[0]:
                axis.set_ylabel(f"$\\sigma$ = {sigma:g}")
            if (sigma, gamma) == trained:
                for spine in axis.spines.values():
                    spine.set(color=ORANGE, linewidth=3)
        half.suptitle(f"{title}: {subtitle}", fontsize=11)
    plt.show()


def draw_errors(error, sigmas, gammas):
    """Mean squared error (sigmas, mask ratios) of the reconstruction, in figures and colours."""
    figure, axis = plt.subplots(figsize=(5.6, 3.6))
    shown = axis.imshow(error, cmap="viridis", norm="log")
    for (row, column), value in np.ndenumerate(error):
        axis.text(column, row, f"{value:.4f}", ha="center", va="center",
                  color="white" if value < 0.06 else "black")
    axis.set(xticks=range(len(gammas)), xticklabels=[f"{gamma:.0%}" for gamma in gammas],
             yticks=range(len(sigmas)), yticklabels=sigmas, xlabel="patches dropped",
             ylabel=r"noise level $\sigma$")
    axis.grid(False)
    figure.colorbar(shown, ax=axis, label="mean squared error (pixels in [0, 1])")
    plt.show()


def draw_tweedie(line, densities, starts, ends, sigma):
    """Densities of clean and noisy points on the grid line x line; arrows from starts to ends."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharex=True, sharey=True)
    titles = "clean $x \\sim \\pi$", f"noisy $\\tilde{{x}} \\sim p$, $\\sigma$ = {sigma}"
    for axis, density, title in zip(axes, densities, titles, strict=True):
        shown = axis.contourf(line, line, density, 8, cmap="Blues")
        axis.set(title=title, xlabel="first coordinate", aspect="equal")
        axis.grid(False)
        figure.colorbar(shown, ax=axis, label="density", shrink=0.85)
    axes[1].quiver(*starts.T, *(ends - starts).T, angles="xy", scale_units="xy", scale=1,
                   color=ORANGE, width=0.004)
    axes[0].scatter(*ends.T, s=10, color=ORANGE)
    axes[0].text(-3.4, 3.2, r"dots: $E[x \mid \tilde{x}]$, the arrows' heads", color=ORANGE,
                 va="center")
    axes[0].set(ylabel="second coordinate", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6))
    plt.show()


def draw_denoisers(levels, errors, trained):
    """{(split, denoiser): mean squared error at each level}, of the training and test digits."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True)
    for axis, split in zip(axes, ("training", "test"), strict=True):
        axis.plot(levels, errors[split, "autoencoder"], "o-", color=BLUE)
        axis.plot(levels, errors[split, "empirical"], "s-", color=ORANGE)
        axis.plot(levels, np.square(levels), ":", color="0.2")
        axis.axvline(trained, color="0.8", zorder=0)
        axis.set(xlabel=r"noise level $\sigma$ (pixels in [0, 1])",
                 title=f"{split} digits, fresh noise", xlim=(0.08, 0.54), ylim=(0, 0.1))
    axes[0].set_ylabel("mean squared error\n(pixels in [0, 1])")
    axes[0].text(0.31, 0.05, "autoencoder,\nmask ratio 0", color=BLUE, ha="left")
    axes[1].text(0.35, 0.008, "posterior mean\nover training digits", color=ORANGE)
    axes[0].text(0.33, 0.085, "copy the noisy\n" r"pixels, $\sigma^2$", color="0.2")
    plt.show()


def draw_rows(rows, titles):
    """{name of the row: images (B, 1, H, W)}, and a title above each column."""
    _, axes = plt.subplots(len(rows), len(titles), figsize=(8.5, 4.5))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        line[0].yaxis.set_label_coords(-0.1, 0.5)
        for axis, image in zip(line, images, strict=True):
            draw_digit(axis, image[0])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    plt.show()


def draw_decay(traces):
    """{(coupled, size of the gradients): weight at each step}."""
    _, axes = plt.subplots(1, 2, figsize=(8.5, 2.8), sharey=True)
    titles = "decoupled (AdamW)", "inside the gradient (Adam with L2)"
    for axis, coupled, title in zip(axes, (False, True), titles, strict=True):
        axis.plot(traces[coupled, 10], color=BLUE)
        axis.plot(traces[coupled, 0.1], "--", color=ORANGE)
        axis.set(title=title, xlabel="step", xlim=(0, 2000), ylim=(0, 1.1))
    axes[0].set_ylabel("weight, mean of 200 runs")
    axes[0].text(150, 0.55, "both weights, one on the other", color="0.2")
    axes[1].text(900, 1.01, "large gradients", color=BLUE)
    axes[1].text(900, 0.2, "small gradients", color=ORANGE)
    plt.show()


def draw_pretraining(rates, rows, mean_image):
    """The learning rate at each step, beside the log's; the log's loss. rows: those of the log."""
    _, axes = plt.subplots(1, 2, figsize=(8.5, 2.8))
    axes[0].plot(rates, color=BLUE)
    axes[0].plot([row["step"] - 1 for row in rows], [row["lr"] for row in rows], "o", color=ORANGE,
                 markersize=4)
    axes[0].text(420, 0.0041, "(3.20), and the run's log", color="0.2")
    axes[0].set(ylabel="learning rate", ylim=(0, 0.0045))
    axes[1].plot([row["step"] for row in rows], [row["loss"] for row in rows], "o-", color=BLUE,
                 markersize=3)
    axes[1].axhline(mean_image, color=GREY, linestyle="--")
    axes[1].text(400, mean_image - 0.02, "answer with the mean image", color=GREY, va="top")
    axes[1].set(ylabel="loss (normalised pixels)\nmean of 50 steps", ylim=(0, 0.9))
    for axis in axes:
        axis.set(xlabel="optimizer step", xlim=(-20, len(rates) + 20))
    plt.show()


# --------------------------------------------------------------------------------------------------
# Notebook 04
# --------------------------------------------------------------------------------------------------


def draw_under_noise(digits, levels, curves, sigma):
    """{title: image} in two rows of four; {name: accuracy of f at each level of the noise}."""
    figure = plt.figure(figsize=(9.5, 3.4))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    for axis, (title, image) in zip(left.subplots(2, 4).flat, digits.items(), strict=True):
        draw_digit(axis, image, title)
    axis = right.subplots()
    places = (0.01, 45), (0.32, 74)
    for (name, values), colour, place in zip(curves.items(), (ORANGE, BLUE), places, strict=True):
        axis.plot(levels, 100 * np.array(values), "o-", color=colour, markersize=4)
        axis.text(*place, name, color=colour)
    axis.axvline(sigma, color=GREY, linewidth=1, linestyle=":")
    axis.set(xlabel="standard deviation of the noise (pixels in [0, 1])",
             ylabel="accuracy of f under noise (%)", ylim=(0, 102), xlim=(0, 0.62))
    plt.show()


def draw_bound(terms):
    """{name: (whether g errs, how often f errs, cross-entropy), each (images,)}, and (4.2)."""
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    edge = np.linspace(0, 1, 100)
    kinds = (False, BLUE, "o", "g right"), (True, ORANGE, "s", "g wrong")
    for axis, (name, (g_errs, f_errs, loss)) in zip(axes, terms.items(), strict=True):
        axis.fill_between(100 * edge, 1e-3, np.maximum(edge * np.log(2), 1e-3), color="0.9",
                          linewidth=0)
        for errs, colour, marker, label in kinds:
            axis.scatter(100 * f_errs[g_errs == errs], loss[g_errs == errs], s=14, color=colour,
                         marker=marker, alpha=0.6, label=label)
        axis.axvline(50, color=GREY, linestyle=":", linewidth=1)
        axis.set(yscale="log", ylim=(2e-3, 20), xlim=(-2, 102), title=name,
                 xlabel="draws in which f errs (%)")
        axis.text(62, 0.02, "impossible by (4.2)", color="0.4")
    axes[0].set_ylabel("mean cross-entropy under noise (nats)")
    axes[1].legend(frameon=False, loc="upper left")
    plt.show()


def draw_layer_rates(moved, kappa, depth):
    """Largest change of each layer in units of lr, beside (4.4), and that of larger networks."""
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3), width_ratios=[1, 1.6])
    places = ["patches,\npositions", *(f"block {block}" for block in range(depth)), "norm,\nhead"]
    axes[0].barh(places, moved, color=BLUE, height=0.6)
    axes[0].plot([kappa ** (depth + 1 - layer) for layer in range(depth + 2)], places, "o",
                 color=ORANGE, label=r"$\kappa^{L+1-j}$")
    axes[0].set(xlabel="largest change of a weight (units of lr)",
                title="digits, one step (bars: measured)")
    axes[0].legend(frameon=False, loc="lower right")
    published = ("ViT-B", 0.65, 12, BLUE), ("ViT-L", 0.75, 24, GREEN)
    for name, factor, blocks, colour in (*published, ("digits", kappa, depth, ORANGE)):
        layers = np.arange(blocks + 2)
        axes[1].semilogy(layers, factor ** (blocks + 1 - layers), "o-", color=colour, markersize=4)
        axes[1].text(blocks + 1, 1.3, f"{name}\nκ = {factor}", color=colour, ha="center")
    axes[1].set(xlabel="layer j (0: patch embedding)", ylabel="share of the learning rate",
                xlim=(-0.5, 28), ylim=(5e-4, 5))
    plt.show()


def draw_mixing(mixup, cutmix):
    """(shares, noise levels after mixing, in sigma) of both, beside (4.7)."""
    _, axis = plt.subplots(figsize=(6, 3.4))
    share = np.linspace(0.5, 1, 100)
    axis.plot(share, np.sqrt(share**2 + (1 - share) ** 2), color=GREY)
    axis.scatter(*mixup, s=12, color=BLUE)
    axis.scatter(*cutmix, s=12, color=ORANGE, marker="s")
    axis.text(0.6, 0.66, r"mixup, on $\sqrt{\mu^2 + (1-\mu)^2}$", color=BLUE)
    axis.text(0.6, 1.04, "cutmix", color=ORANGE)
    axis.set(xlabel="share μ of the image that has the larger share",
             ylabel="noise level after mixing (σ)", ylim=(0.6, 1.1))
    plt.show()


def draw_pair_loss(odds, surface, cuts):
    """2 KL + 0.5 H over both copies' odds; along and across the diagonal, {name: each term}."""
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.1), width_ratios=(1.25, 1, 1))
    steps = 2.0 ** np.arange(-7, 4)
    norm = plt.matplotlib.colors.LogNorm(steps[0], steps[-1])
    shown = axes[0].contourf(odds, odds, surface.T, levels=steps, cmap="cividis", extend="both",
                             norm=norm)
    figure.colorbar(shown, ax=axes[0], label="2 KL + 0.5 H (nats)", ticks=steps[::2],
                    format="%.3g")
    axes[0].plot((0, 1), (0, 1), color="white", linewidth=1)
    axes[0].plot((0, 1), (1, 0), color="white", linewidth=1, linestyle="--")
    axes[0].set(xlabel="$p_1$", ylabel="$p_2$", aspect="equal", title="both terms, log colours")
    axes[0].grid(False)
    for axis, (title, terms) in zip(axes[1:], cuts.items(), strict=True):
        for term, colour, width in zip(terms, (ORANGE, GREEN, BLUE), (3, 3, 1.5), strict=True):
            axis.plot(odds, term, color=colour, linewidth=width)
        axis.set(xlabel="$p_1$", ylim=(0, 0.8), title=title)
    axes[1].text(0.5, 0.02, "2 KL = 0", color=ORANGE, ha="center")
    axes[1].text(0.5, 0.37, "sum = 0.5 H", color=BLUE, ha="center")
    axes[2].text(0.5, 0.29, "0.5 H", color=GREEN, ha="center")
    axes[2].text(0.5, 0.06, "2 KL", color=ORANGE, ha="center")
    axes[2].text(0.5, 0.55, "sum", color=BLUE, ha="center")
    axes[1].set(ylabel="nats")
    plt.show()


def draw_certified(radii, styles, gain_over=None):
    """Certified accuracy over r; {name: radii (images,)}, {name: (colour, line)}.

    With gain_over, the name of one: right, what the others certify more.
    """
    columns = 1 if gain_over is None else 2
    _, axes = plt.subplots(1, columns, figsize=(3.2 + 3.3 * columns, 3.6), squeeze=False)
    grid = np.linspace(0, 0.6, 601)
    shares = {name: np.array([100 * np.mean(radii[name] >= r) for r in grid]) for name in styles}
    for name, (colour, line) in styles.items():
        axes[0, 0].plot(grid, shares[name], line, color=colour, label=name)
        if gain_over is not None:
            more = shares[name] - shares[gain_over]
            axes[0, 1].plot(grid[::5], more[::5], line, color=colour)
            point = f"points; one image is {100 / len(radii[gain_over]):.1f}"
            axes[0, 1].set(ylabel=f"more than {gain_over}\n({point})")
    axes[0, 0].set(ylabel="certified accuracy (%)", ylim=(0, 102))
    axes[0, 0].legend(frameon=False, loc="lower left")
    for axis in axes[0]:
        axis.set(xlabel=r"radius $r$ ($\ell_2$, pixels in [0, 1])", xlim=(0, 0.6))
    plt.show()


def draw_seeds(axis, place, values, colour):
    """A dot for each seed, a bar across for their mean, and the mean in figures."""
    axis.plot(values, place + np.linspace(-0.08, 0.08, len(values)), "o", color=colour,
              markersize=4)
    axis.plot([values.mean()] * 2, [place - 0.22, place + 0.22], color=colour, linewidth=2)
    axis.text(values.max() + 1, place, f"{values.mean():.1f}", va="center", color=colour,
              fontsize=9)


def draw_comparison(results, titles, colours):
    """{measure: {task: {name: accuracies of the seeds (%)}}}, {measure: title}, {name: colour}."""
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
    for axis, (measure, tasks) in zip(axes, results.items(), strict=True):
        for row, runs in enumerate(tasks.values()):
            for place, (name, values) in enumerate(runs.items()):
                draw_seeds(axis, -4 * row - place, values, colours[name])
                axis.text(21, -4 * row - place, name, color=colours[name], va="center", fontsize=9)
            axis.axhline(-4 * row + 1, color="0.9", linewidth=1)
        axis.set(title=titles[measure], xlim=(20, 103), xlabel="test images right (%)")
        axis.grid(False, axis="y")
    axes[0].set_yticks([-1, -5, -9], [task.replace(" per", "\nper") for task in tasks])
    plt.show()


def draw_ablation(found):
    """{head: {(noise, mask ratio, loss on): ACR of the seeds}}: a dot each, a bar for the mean."""
    _, axes = plt.subplots(1, len(found), figsize=(9.5, 3.6), sharey=True)
    for axis, (head, cells) in zip(axes, found.items(), strict=True):
        for row, ((noise, _, _), values) in enumerate(cells.items()):
            colour, height = BLUE if noise else PURPLE, -row - 0.6 * (row >= len(cells) // 2)
            axis.plot(values, height + np.linspace(-0.12, 0.12, len(values)), "o", color=colour,
                      markersize=4)
            axis.plot([values.mean()] * 2, [height - 0.32, height + 0.32], color=colour,
                      linewidth=2)
            axis.text(values.max() + 0.012, height, f"{values.mean():.3f}", va="center",
                      color=colour, fontsize=9)
        axis.set(title=head, xlabel="average certified radius, σ = 0.25", xlim=(0, 0.52))
        axis.grid(False, axis="y")
    heights = [-row - 0.6 * (row >= len(cells) // 2) for row in range(len(cells))]
    names = [f"{'noise' if noise else 'no noise'}, {ratio:.0%}, {loss}"
             for noise, ratio, loss in cells]
    axes[0].set_yticks(heights, names)
    plt.show()


def draw_heatmap(acr, ratios, sigmas):
    """ACR (mask ratios, sigmas of pre-training) of a probe, in figures and colours; nan: none."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    shown = axis.imshow(acr, origin="lower", cmap="viridis", aspect="auto")
    middle = (np.nanmin(acr) + np.nanmax(acr)) / 2
    for (row, column), value in np.ndenumerate(acr):
        if np.isfinite(value):
            axis.text(column, row, f"{value:.3f}", ha="center", va="center",
                      color="black" if value > middle else "white")
    axis.set(xticks=range(len(sigmas)), xticklabels=[f"{sigma:g}" for sigma in sigmas],
             yticks=range(len(ratios)), yticklabels=[f"{ratio:.0%}" for ratio in ratios],
             xlabel="σ of pre-training", ylabel="patches dropped")
    axis.grid(False)
    figure.colorbar(shown, ax=axis, label="average certified radius")
    plt.show()


def draw_baselines(results, titles, colours):
    """{measure: {name: accuracies of the seeds (%)}}; a line after the fourth name."""
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), sharey=True)
    for axis, (measure, runs) in zip(axes, results.items(), strict=True):
        for place, (name, values) in enumerate(runs.items()):
            draw_seeds(axis, -place, values, colours[name])
        axis.axhline(-3.5, color=GREY, linestyle=":", linewidth=1)
        axis.set(title=titles[measure], xlabel="test images right (%)", xlim=(60, 102))
        axis.grid(False, axis="y")
    axes[0].set_yticks([-place for place in range(len(runs))], runs)
    plt.show()


# --------------------------------------------------------------------------------------------------
# Notebooks 05 and 06
# --------------------------------------------------------------------------------------------------


def draw_digit(axis, image, title="", colour="black"):
    """A digit (8, 8) with pixels in [0, 1], strokes bright on black, and its label."""
    axis.imshow(image.clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, color=colour)


def draw_change(axis, change, title, limit):
    """A perturbation (8, 8), red where brighter, blue where darker; returns the drawn image."""
    shown = axis.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    return shown


# --------------------------------------------------------------------------------------------------
# Notebook 05
# --------------------------------------------------------------------------------------------------


def picture_of_votes(x, label, copies, answers, top, shares, p_lower):
    """The image x (1, 8, 8), and fourteen of its noisy copies with f's answers, wrong ones too.

    To the right, the share of the copies that each class got, and the lower bound of `top`'s.
    """
    figure = plt.figure(figsize=(9.8, 2.7))
    left, right = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    axes = left.subplots(2, 8)
    draw_digit(axes[0, 0], x[0], f"clean, y = {label}")
    axes[1, 0].axis("off")
    wrong = (answers != top).nonzero().flatten()[:5].tolist()
    others = (answers == top).nonzero().flatten()[:14 - len(wrong)].tolist()
    for axis, i in zip(axes[:, 1:].flat, [*others, *wrong], strict=False):
        colour = "black" if answers[i] == top else ORANGE
        draw_digit(axis, copies[i, 0], f"f: {int(answers[i])}", colour)
    axis = right.subplots()
    colours = [BLUE if c == top else ORANGE for c in range(len(shares))]
    axis.bar(range(len(shares)), shares, color=colours)
    axis.axhline(p_lower, color=GREY, linestyle="--", linewidth=1)
    below = p_lower > 0.15
    axis.text(9.6, p_lower + (-0.02 if below else 0.02), r"$\underline{p_A}$", ha="right",
              va="top" if below else "bottom")
    axis.set(xlabel="answer of f", ylabel="share of noisy copies", ylim=(0, 1),
             xticks=range(len(shares)))
    plt.show()


def picture_of_curves(r, curves, limits):
    """Certified accuracy (%) over r, {sigma: curve}, and their envelope's area; ticks at limits."""
    figure, axis = plt.subplots(figsize=(7.4, 3.8))
    axis.fill_between(r, np.max([*curves.values()], axis=0), color="0.93", linewidth=0)
    places = {0.125: (0.02, 103), 0.25: (0.52, 66), 0.5: (0.73, 40), 1: (0.03, 20)}
    for (sigma, curve), colour in zip(curves.items(), (GREEN, BLUE, ORANGE, PURPLE), strict=True):
        axis.plot(r, curve, color=colour)
        axis.text(*places[sigma], rf"$\sigma$ = {sigma:g}", color=colour)
        if limits[sigma] < r[-1]:
            axis.plot(limits[sigma], 0, "|", color=colour, markersize=16, markeredgewidth=2,
                      clip_on=False)
    axis.text(0.55, 14, "below the envelope:\nthe best $\\sigma$ at each $r$", color="0.35",
              ha="center")
    axis.set(xlabel="radius $r$ ($\\ell_2$, pixels in [0, 1]); "
             "ticks: largest provable (0.5 and 1: outside)", ylabel="certified accuracy (%)",
             xlim=(0, 1.1), ylim=(0, 110), yticks=range(0, 101, 20))
    plt.show()


def picture_of_attacks(factors, success, unsure, random):
    """Shares of attacks that succeed, and on which the judge abstains, over the attacks' size."""
    figure, axis = plt.subplots(figsize=(6.6, 3.4))
    axis.axvspan(0, 1, color="0.93")
    axis.fill_between(factors, 100 * success, 100 * (success + unsure), color=ORANGE, alpha=0.25,
                      linewidth=0)
    axis.plot(factors, 100 * success, "o-", color=ORANGE)
    axis.plot(factors, 100 * random, "s--", color=BLUE)
    axis.text(0.5, 55, "certified:\nno success\npossible", ha="center", color="0.35")
    axis.text(1.66, 19, "projected gradient", color=ORANGE)
    axis.text(1.02, 84, "judge\nabstains", color=ORANGE, alpha=0.8)
    axis.text(2.2, 7, "random direction", color=BLUE)
    axis.set(xlabel="size of the perturbation / certified radius of the image",
             ylabel="attacks that succeed (%)", xlim=(0, 3.05), ylim=(-3, 103))
    plt.show()


def picture_of_attacked(x, y, R, delta, answers, name):
    """A column for each image x (B, 1, 8, 8): clean, its perturbation, attacked with g's answer."""
    figure, axes = plt.subplots(3, len(x), figsize=(1.3 * len(x) + 1.2, 4.6), squeeze=False)
    for column in range(len(x)):
        draw_digit(axes[0, column], x[column, 0], f"y = g = {int(y[column])}\nR = {R[column]:.2f}")
        length = f"length {delta[column].norm():.2f}"
        shown = draw_change(axes[1, column], delta[column, 0], length, 0.4)
        attacked = (x + delta)[column, 0]
        draw_digit(axes[2, column], attacked, f"g = {int(answers[column])}", ORANGE)
    for axis, word in zip(axes[:, 0], ("clean", name, "attacked"), strict=True):
        axis.set_ylabel(word, rotation=0, ha="right", va="center")
    figure.colorbar(shown, ax=axes[1, :], label="pixel change")
    plt.show()


def picture_of_the_floor(sizes, shares, bounds):
    """The share of the vote that each attack leaves, over its size and over the theorem's floor."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    axes[0].axvspan(0, 1, color="0.93")
    axes[0].axhline(0.5, color=GREY, linewidth=1)
    axes[0].scatter(sizes, shares, s=14, color=BLUE)
    axes[0].set(xlabel=r"size of the attack, $\|\delta\|$ / $R$",
                ylabel="share of noisy copies with class $A$", xlim=(0, 3.1), ylim=(-0.02, 1.02))
    axes[0].text(0.5, 0.05, "certified", ha="center")
    points = axes[1].scatter(bounds, shares, s=14, c=sizes, cmap="viridis")
    axes[1].plot((0, 1), (0, 1), color=ORANGE)
    axes[1].text(0.62, 0.5, "the theorem's floor", color=ORANGE)
    axes[1].set(xlim=(-0.02, 1.02),
                xlabel=r"lower bound $\Phi(\Phi^{-1}(\underline{p_A}) - \|\delta\|/\sigma)$")
    figure.colorbar(points, ax=axes[1], label=r"$\|\delta\|$ / $R$")
    plt.show()


def pushed_apart(heights, gap):
    """The heights, pushed apart until they are `gap` from each other: for labels at a margin."""
    order, places = np.argsort(heights), np.sort(np.array(heights, dtype=float))
    for _ in range(500):
        overlap = (gap - np.diff(places)).clip(min=0) / 3
        places[:-1] -= overlap
        places[1:] += overlap
    placed = np.empty(len(places))
    placed[order] = places
    return placed


def draw_published(axis, radii, methods, originals, gap):
    """The rows {name: values} of a table over its radii: DMAE in colour, the others in grey.

    Each is labelled at its end. Crosses are the originals {name: values}, where they differ.
    """
    labels_at = pushed_apart([values[-1] for values in methods.values()], gap)
    for (name, values), height in zip(methods.items(), labels_at, strict=True):
        ours = name.startswith("DMAE")
        colour = GREY if not ours else BLUE if name == "DMAE ViT-B" else ORANGE
        axis.plot(radii, values, "o-", color=colour, linewidth=2 if ours else 0.8,
                  markersize=5 if ours else 3, zorder=3 if ours else 2)
        place = (radii[-1] + 0.09 * (radii[-1] - radii[0]), height)
        line = dict(arrowstyle="-", color=colour, linewidth=0.6, relpos=(0, 0.5), shrinkB=2)
        axis.annotate(name, (radii[-1], values[-1]), xytext=place, va="center", color=colour,
                      fontsize=9, annotation_clip=False, arrowprops=line)
        if name in originals:
            other = np.where(np.array(originals[name]) != values, originals[name], np.nan)
            axis.vlines(radii, values, other, color=GREEN, linewidth=1, zorder=1)
            axis.plot(radii, other, "x", color=GREEN, markersize=6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(xlabel=r"radius $r$ ($\ell_2$, pixels in [0, 1])", ylabel="certified accuracy (%)",
             xlim=(radii[0] - 0.05, radii[-1] + 0.05), xticks=radii)


def picture_of_published(published, originals):
    """The tables of the paper, ImageNet's and CIFAR-10's, and the originals where they differ."""
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6))
    for axis, data, gap, low, high in ((axes[0], "imagenet", 3.4, 5, 78),
                                       (axes[1], "cifar10", 3.0, 18, 84)):
        draw_published(axis, *published[data], originals[data], gap)
        axis.set(title=f"{data}: published", ylim=(low, high))
    axes[0].text(0.55, 8, "x: the original,\nwhere it differs", color=GREEN)
    plt.show()


# --------------------------------------------------------------------------------------------------
# Notebook 06
# --------------------------------------------------------------------------------------------------


def picture_of_two_losses(J, each, votes):
    """The two losses of each image, (6.2) and (6.1), coloured by the share of right copies."""
    figure, axis = plt.subplots(figsize=(5.6, 3.6))
    points = axis.scatter(J, each, c=votes, cmap="viridis", s=18, vmin=0, vmax=1)
    axis.axline((0.3, 0.3), slope=1, color=GREY, linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="$J$: minus the log of the mean score",
             ylabel="(6.1): mean of minus the logs")
    axis.text(0.6, 0.45, "equal", color=GREY)
    figure.colorbar(points, ax=axis, label="share of copies that $f$ gets right")
    plt.show()


def picture_of_agreement(x, y, scores, divergence):
    """A row for each image: it, the scores (copies, K) of its copies, and their mean."""
    figure, axes = plt.subplots(len(x), 3, figsize=(9.4, 3.6), width_ratios=(1, 3, 3))
    for row in range(len(x)):
        draw_digit(axes[row, 0], x[row, 0], f"y = {int(y[row])}")
        shown = axes[row, 1].imshow(scores[row][:20], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes[row, 1].grid(False)
        axes[row, 1].set(xticks=range(10), yticks=[], ylabel="20 copies",
                         title="$F_i$, a row a copy")
        axes[row, 2].bar(range(10), scores[row].mean(dim=0), color=BLUE)
        axes[row, 2].set(xticks=range(10), ylim=(0, 1),
                         title=f"$F$; mean KL($F$ || $F_i$) = {divergence[row]:.3f}")
    for axis in axes[-1, 1:]:
        axis.set_xlabel("class")
    figure.colorbar(shown, ax=axes, label="score, left")
    plt.show()


def picture_of_attack(path, y, seen, fresh):
    """An attack's images (1, 1, 8, 8), step by step; the label's score on seen and fresh noise."""
    steps = len(path)
    figure = plt.figure(figsize=(10, 3.0))
    left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1))
    axes = left.subplots(2, steps)
    for step, image in enumerate(path):
        draw_digit(axes[0, step], image[0, 0], f"y = {y}\nstep {step}")
        way = (image - path[0])[0, 0]
        shown = draw_change(axes[1, step], way, f"length {way.norm():.2f}", 0.2)
    left.colorbar(shown, ax=axes[1, :], label="change")
    axis = right.subplots()
    axis.plot(seen, "o--", color=ORANGE)
    axis.plot(fresh, "o-", color=BLUE)
    words = (("the copies\nof the attack", ORANGE), ("2000\nfresh copies", BLUE))
    places = pushed_apart((seen[-1], fresh[-1]), 0.18)
    for place, (word, colour) in zip(places, words, strict=True):
        axis.text(steps - 0.85, max(place, 0.06), word, color=colour, va="center")
    axis.set(xlabel="step", ylabel=f"smoothed score of y = {y}", ylim=(-0.05, 1.05),
             xlim=(-0.2, steps + 0.9), xticks=range(steps))
    plt.show()


def picture_of_macer(share, hinge, cross, hard, soft):
    """Left: hinge and J over a score. Right: soft radii {beta: radii} over those by votes."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    axes[0].plot(share, hinge, color=GREEN)
    axes[0].plot(share, cross, color=BLUE)
    axes[0].text(0.62, 0.94, r"hinge, $\sigma/2\ (\gamma_M - \xi_M)$", color=GREEN)
    axes[0].text(0.6, 0.56, r"$J = -\log F_y$", color=BLUE)
    axes[0].set(xlabel="score of $y$ (two classes)", xlim=(0.5, 1), ylim=(0, 1.05),
                ylabel=r"loss ($\lambda_M = 1$, $\sigma$ = 0.25)")
    for (beta, radii), colour in zip(soft.items(), (GREY, ORANGE, PURPLE), strict=True):
        axes[1].scatter(hard, radii, s=10, color=colour, label=rf"$\beta_M$ = {beta}")
    axes[1].axline((0, 0), slope=1, color=GREY, linewidth=1)
    axes[1].set(xlabel="radius by votes (200 copies, no bound)",
                ylabel=r"soft radius $\sigma\xi_M/2$")
    axes[1].legend(frameon=False)
    plt.show()


def picture_of_smoothmix(walk, between, shares, scores, target, y):
    """The ascent and the way to its end (a digit each), the score along it and what is wanted."""
    figure = plt.figure(figsize=(10, 3.0))
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    axes = left.subplots(2, len(walk))
    for step, image in enumerate(walk):
        length = (image - walk[0]).norm()
        draw_digit(axes[0, step], image[0, 0], f"y = {y}, step {step}\nlength {length:.2f}")
        place = round(step * (len(shares) - 1) / 2 / (len(walk) - 1))
        draw_digit(axes[1, step], between[place][0], rf"$\mu$ = {float(shares[place]):.2f}")
    axes[0, 0].set_ylabel("$x'_t$", fontsize=9)
    axes[1, 0].set_ylabel(r"$x_\mu$", fontsize=9)
    axis = right.subplots()
    axis.axvspan(0, 0.5, color="0.93")
    axis.plot(shares, scores, color=BLUE)
    middle = len(shares) // 2
    axis.plot(shares[:middle + 1], target[:middle + 1], color=PURPLE)
    axis.text(0.52, float(target[middle]), r"wanted, $y_\mu$", color=PURPLE, va="center")
    axis.text(0.28, float(scores[middle // 2]) + 0.06, "committed classifier", color=BLUE)
    axis.text(0.03, 0.02, r"range of $\mu$")
    axis.set(xlabel=r"share $\mu$ of the adversarial image", ylabel=f"smoothed score of y = {y}",
             ylim=(0, 1.05), xlim=(0, 1))
    plt.show()


def picture_of_consensus(noise_levels, passes, networks, asked, sigma, right, agreement):
    """Passes a copy over the noise; and how often two agree on an image, over how often right."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.3))
    axes[0].plot(noise_levels, passes, "o-", color=BLUE)
    for level, word in ((networks, "all networks, always"), (asked, "the least")):
        axes[0].axhline(level, color=GREY, linewidth=1)
        axes[0].text(1.0, level - 0.08, word, color=GREY, va="top", ha="right")
    axes[0].axvline(sigma, color=GREY, linestyle=":")
    axes[0].text(sigma + 0.01, asked + 0.7 * (networks - asked), "trained for", color=GREY)
    axes[0].set(xlabel=r"noise $\sigma$", ylabel="passes a noisy copy",
                ylim=(asked - 0.3, networks + 0.2))
    axes[1].scatter(right, agreement, s=16, color=BLUE)
    axes[1].set(xlabel="copies that the ensemble gets right (a point an image)",
                ylabel="copies on which two agree")
    plt.show()


def picture_of_denoising(columns):
    """A column for each (sigma, label, clean, noisy, restored, scores of noisy, of restored)."""
    figure, axes = plt.subplots(4, len(columns), figsize=(9.6, 4.6))
    for axis, column in zip(axes.T, columns, strict=True):
        sigma, label, clean, noisy, restored, before, after = column
        draw_digit(axis[0], clean, f"y = {label}")
        draw_digit(axis[1], noisy, rf"$\sigma$ = {sigma}")
        draw_digit(axis[2], restored)
        axis[3].bar(range(len(before)), before, color=GREY, width=0.8)
        axis[3].bar(range(len(after)), after, color=BLUE, width=0.4)
        axis[3].set(xticks=(0, 5, 9), yticks=[], ylim=(0, 1))
        axis[3].grid(False)
    names = ("clean", "noisy", "denoised", "scores: noisy grey,\ndenoised blue")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    plt.show()


def picture_of_steps(steps, error, coarse, on_digits, marked, rows):
    """The error over the step that a diffusion is told, steps marked {word: step}; rows of digits.

    rows: {name: [(digit (8, 8), title), ...]}.
    """
    figure = plt.figure(figsize=(10, 3.2))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    axis = left.subplots()
    axis.plot(steps, error, color=BLUE)
    axis.plot(coarse, on_digits, ".", color=GREY)
    heights = [error[int((steps == step).nonzero())] for step in marked.values()]
    axis.plot([*marked.values()], heights, "o", color=ORANGE)
    (first, forgotten), (low, high) = marked, heights
    axis.text(marked[first], low - 0.004, first, color=ORANGE, ha="center", va="top")
    axis.text(marked[forgotten] + 12, high + 0.002, forgotten, color=ORANGE)
    axis.text(560, 0.038, "Gaussian data,\n(6.15)", color=BLUE, ha="right")
    axis.text(690, 0.017, "test digits,\nclipped", color=GREY, ha="right")
    axis.set(xlabel="step $t$ that the model is told", ylabel="mean squared error, σ = 0.25",
             ylim=(0, None))
    axes = right.subplots(len(rows), 6)
    for line, (name, digits) in zip(axes, rows.items(), strict=True):
        for place, (digit, title) in zip(line, digits, strict=True):
            draw_digit(place, digit, title)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    plt.show()


def picture_of_objectives(points, names, sigmas):
    """ACR over the seconds of fine-tuning: points (sigma, name, part, seconds, ACRs, collapsed).

    A point is a method's mean over its seeds, with the standard deviation. Seconds and ACRs are of
    runs that learnt something; collapsed are the seconds of those that answer one class: crosses at
    the lower edge, which set no axis.
    """
    figure, axes = plt.subplots(1, len(sigmas), figsize=(11.5, 3.9))
    colours = dict(zip(names, (GREY, BLUE, GREEN, ORANGE, PURPLE), strict=True))
    for sigma, name, part, seconds, acr, collapsed in points:
        axis, colour = axes[sigmas.index(sigma)], colours[name]
        axis.plot(collapsed, [0.04] * len(collapsed), "x", color=colour, markersize=7,
                  transform=axis.get_xaxis_transform())
        if not acr:
            continue
        deviation = np.std(acr, ddof=1) if len(acr) > 1 else 0
        axis.errorbar(np.mean(seconds), np.mean(acr), yerr=deviation, color=colour, linewidth=1)
        fill = colour if part == "equal epochs" else "white"
        axis.plot(np.mean(seconds), np.mean(acr), "o", color=colour, markerfacecolor=fill,
                  markersize=7)
    for axis, sigma in zip(axes, sigmas, strict=True):
        axis.set(xscale="log", xlabel="processor seconds of fine-tuning", xlim=(6, 65),
                 title=rf"$\sigma$ = {sigma:g}")
        axis.set_xticks((10, 20, 50), (10, 20, 50), minor=False)
        axis.set_xticks((), minor=True)
        axis.margins(y=0.15)
    axes[0].set_ylabel("ACR, two-sided")
    marks = [plt.Line2D([], [], marker="o", linestyle="", color=colours[name]) for name in names]
    marks.append(plt.Line2D([], [], marker="x", linestyle="", color="black"))
    figure.legend(marks, [*names, "one class: ACR not drawn"], loc="outside lower center", ncols=6,
                  frameon=False)
    figure.suptitle("filled: ten epochs; open: about the time of consistency's ten; "
                    "bars: standard deviation over seeds", fontsize=10)
    plt.show()


# --------------------------------------------------------------------------------------------------
# Notebook 07
# --------------------------------------------------------------------------------------------------


def picture_of_peeking(looks, peeked, anytime, steps, paths, alpha):
    """The chance of an error so far, and paths of the evidence.

    peeked, anytime: {alpha: chance / alpha at each look}, p = 0.75; paths: {what is true:
    log10 of the evidence (paths, steps)}.
    """
    _, axes = plt.subplots(1, 2, figsize=(8.6, 3.7))
    for a, style in zip(peeked, ("-", "--"), strict=True):
        axes[0].semilogy(looks, peeked[a], style, color=ORANGE, label=f"Clopper-Pearson, α = {a}")
        axes[0].semilogy(looks, anytime[a], style, color=BLUE, label=f"anytime bound, α = {a}")
    axes[0].axhline(1, color="black", linewidth=1)
    axes[0].set(xlabel="draws, with a look after every 100", xlim=(0, looks[-1]))
    axes[0].set(ylabel="chance of an error so far / α", ylim=(0.001, 40), title="exact, p = 0.75")
    axes[0].legend(loc="lower right")
    for (name, evidence), colour in zip(paths.items(), (BLUE, ORANGE), strict=True):
        lines = axes[1].plot(steps, evidence.T, color=colour, linewidth=0.8, alpha=0.8)
        lines[0].set_label(name)
    height = -np.log10(alpha)
    axes[1].axhline(height, color="black", linewidth=1)
    behind = dict(facecolor="white", edgecolor="none", pad=1)
    axes[1].text(steps[-1], height - 0.8, f"1/α = {1 / alpha:g}", ha="right", bbox=behind)
    axes[1].set(xlabel="draws", xlim=(0, steps[-1]), ylim=(-3, 8))
    axes[1].set(ylabel=r"$\log_{10}$ of the evidence $E_n$")
    axes[1].set_title("betting against the claim $p \\leq 0.5$")
    axes[1].legend(loc="upper left")
    plt.show()


def picture_of_draws(radii, draws, r, most):
    """Draws (true radii, runs) until the rule stops, with the radius r asked."""
    _, axis = plt.subplots(figsize=(5.6, 3.6))
    axis.axvline(r, color="0.6", linewidth=1)
    axis.axhline(most, color=ORANGE, linestyle="--", label="fixed n")
    axis.semilogy(radii, draws, "o", color=BLUE, markersize=5, alpha=0.6)
    axis.semilogy(radii, draws.mean(axis=1), color=BLUE, label="sequential: runs, mean")
    axis.set(xlabel=f"true radius, with $r$ = {r} asked (pixels in [0, 1])", ylabel="draws")
    axis.set(ylim=(700, 250_000))
    axis.legend(loc="center right")
    plt.show()


def picture_of_floats(places, share):
    """The share of noisy copies that class 1 gets over the pixel, counted with floats."""
    _, axis = plt.subplots(figsize=(5.6, 3.4))
    axis.plot(places, 100 * share, ".", color=ORANGE, label="floats: counted")
    axis.axhline(0, color=BLUE, label="real numbers")
    axis.set(xlabel="pixel x", ylabel="noisy copies in class 1 (%)", ylim=(-3, 103))
    axis.legend(loc="center right")
    plt.show()


def picture_of_grid_noise(values, observed, probability, draws):
    """The frequencies of the integers, drawn and by (7.7)."""
    _, axis = plt.subplots(figsize=(5.6, 3.2))
    axis.bar(values, 100 * observed, color=BLUE, width=0.7, label=f"drawn, {with_spaces(draws)}")
    axis.plot(values, 100 * probability, "o", color=ORANGE, markersize=4, label="(7.7)")
    axis.set(xlabel=r"integer $j$ (noise in units of $1/16$)", ylabel="share (%)")
    axis.legend()
    plt.show()
