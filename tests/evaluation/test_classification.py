"""What is said and drawn of a classifier's predictions, whatever its classes are called."""

from PIL import Image

from hf_decoder.evaluation.classification import check_against_chance, class_report, plot_confusion


def test_a_class_may_have_any_name(tmp_path):
    """matplotlib reads what stands between dollar signs as a formula, and `accuracy` is a measure of the report."""
    for names in (["$", "$$"], ["accuracy", "macro avg"], [r"\frac", "$x^$", "a_b"]):
        labels = [names[n % len(names)] for n in range(40)]
        report = class_report(labels, labels, names)
        plot_confusion(report, tmp_path / "matrix.png", title=f"{names[0]} on $$.csv")
        with Image.open(tmp_path / "matrix.png") as picture:
            assert picture.format == "PNG"
        assert check_against_chance(report) is None
        always = class_report([names[0]] * 40, labels, names)
        assert f"always {names[0]!r} would be right" in check_against_chance(always)
