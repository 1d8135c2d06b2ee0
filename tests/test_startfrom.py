"""A training that begins with an earlier run's weights: which they are, what starts fresh, and that nobody is validated on whom they know."""
import pytest
import torch

BASE = dict(data="synthetic", image_size=64, epochs=1, batch_size=4, accelerator="cpu", limit=16, monitor="val_loss", val_fraction=0.3)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, small_set):
    "runs/earlier, as a training on the eight classes of nih8 leaves it, but for the training."
    from cxr_nbdev import train as t
    from cxr_nbdev.config import TrainConfig
    from cxr_nbdev.model import save_detector
    from cxr_nbdev.run import Run
    home = tmp_path_factory.mktemp("earlier")
    cfg, run = TrainConfig(**BASE, classes="nih8", data_root=str(small_set)), Run("earlier", home/"earlier")
    data = t.get_data(cfg)
    det = t.make_detector(cfg, data.tables.classes)
    with torch.no_grad(): [v.add_(torch.rand(v.shape)) for v in det.state_dict().values() if v.is_floating_point()]    # no weight is what a new one would be
    seven = TrainConfig(**BASE, data_root=str(small_set))                  # who is held out depends on the classes: the same patients as for a run on nih7
    save_detector(run.best, det, t.checkpoint_facts(seven, run, t.get_data(seven)))
    (run.folder/"config.json").write_text("{}")
    return home


def begin(home, root, **values):
    "Up to the first epoch: (cfg, run, data, detector, facts, what was said)."
    from cxr_nbdev import train as t
    from cxr_nbdev.config import parse_config
    from cxr_nbdev.run import open_run
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CXR_RUNS", str(home))
        cfg, said = parse_config(BASE | dict(data_root=str(root)) | values), []
        run = open_run(cfg)
        device, detector = t.check_inputs(cfg)
        data = t.get_data(cfg)
        detector, facts = t.fit_to_data(cfg, run, detector, data, device, said.append)
        return cfg, run, data, detector, facts, "\n".join(said)


def test_weights(earlier, small_set):
    "nih7 from nih8: all tensors are the earlier run's but the class head, of which six rows are; `pretrained` is superseded, and asks for no network."
    _, _, data, det, facts, said = begin(earlier, small_set, run="new", start_from="earlier", image_size=128, anchor_scale=2.0, pretrained=True)
    old = torch.load(earlier/"earlier/best.ckpt", weights_only=True)
    theirs, names = {k.removeprefix("detector."): v for k, v in old["state_dict"].items()}, old["cxr_nbdev"]["classes"]
    heads = 0
    for k, v in det.state_dict().items():
        mine, was = det.by_class(k, v, 7), det.by_class(k, theirs[k], 8)
        if mine is None: assert torch.equal(v, theirs[k]), k
        else:
            heads += 1
            for c in facts["started_from"]["classes_taken"]: assert torch.equal(mine[det.classes.index(c)], was[names.index(c)]), (k, c)
    assert heads == 2 and facts["started_from"]["classes_fresh"] == ["Nodule/Mass"] and len(facts["started_from"]["classes_taken"]) == 6
    assert data.earlier == {"synthetic": old["cxr_nbdev"]["extra"]["train_patients"]} and "take the place of the published ones" in said


def test_refused(earlier, small_set):
    "Patients of the earlier training on the validation side; another network; no such run. Nothing is left behind."
    with pytest.raises(ValueError, match=r"trained on \d+ of the \d+ validation patients.*Hold out whom that run held out"): begin(earlier, small_set, run="new", start_from="earlier", seed=7, limit=0)
    with pytest.raises(ValueError, match="Give `architecture` as 'tf_efficientdet_lite0'"): begin(earlier, small_set, run="new", start_from="earlier", architecture="tf_efficientdet_d0", image_size=128)
    with pytest.raises(FileNotFoundError, match="did you mean `earlier`"): begin(earlier, small_set, run="new", start_from="earlyer")
    assert not (earlier/"new").exists()
