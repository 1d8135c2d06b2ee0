"What a second device has to do, on a simulated one (`simulated_device.py`), where there is no GPU."
import pytest
from conftest import ROOT, run

CHECK = '''
"Films from there, and that the device would have refused what a GPU refuses."
import numpy as np, pytest, simulated_device, torch
simulated_device.pytest_configure()
from cxr_nbdev import film
from cxr_nbdev.synth import draw_films, set_up

setups, counted = [set_up(i, ["Mass"], difficulty="hard") for i in range(4)], simulated_device.counted
draw_films(setups, 96)
assert not counted()                                       # a CPU's films need nothing of it
draw_films(setups, 96, "sim")
ran = counted()
waited = {k: n for k, n in ran.items() if k.startswith("waits: ")}
n = sum(ran.values())-sum(waited.values())
print(f"{n} operations of {len(ran)-len(waited)} kinds for {len(setups)} films; {sum(waited.values())} times waited")
assert n > 300*len(setups) and len(ran) > 40

x, ones = torch.rand(4, 4, device="sim"), torch.ones(4, 4)
for mixed in (lambda: x+ones, lambda: ones.add_(x), lambda: x @ ones, lambda: torch.cat([x, ones]), lambda: torch.where(x > 0, ones, x), lambda: ones[x.long()], lambda: torch.zeros(()).add_(x[0, 0])):
    with pytest.raises(RuntimeError, match="same device|indices should be"): mixed()
for taken in (x.numpy, lambda: np.asarray(x), lambda: np.add(x, 1)):
    with pytest.raises(TypeError, match="sim:0 device type tensor to numpy"): taken()
assert (x*torch.tensor(2.)+x[torch.tensor([0, 1, 2, 3])]).device.type == "sim"             # these two a GPU allows
torch.sim.set_sync_debug_mode("error")
for waiting in (x.sum().item, x.cpu, x.nonzero, lambda: x[x > .5], lambda: ones.to("sim")):
    with pytest.raises(RuntimeError, match="has to wait"): waiting()
torch.sim.set_sync_debug_mode("default")

for wrong, says in ((lambda x, *a, **kw: x+torch.zeros(x.shape), "same device"), (lambda x, *a, **kw: x.mul_(float(x.numpy().max())), "tensor to numpy")):
    film.blur = wrong                                      # such a slip in the middle of a film is found
    with pytest.raises((RuntimeError, TypeError), match=says): draw_films(setups, 96, "sim")
'''


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    "Environment of a process that has the device: it can't be taken out of torch again, so it stays out of this one."
    from simulated_device import build
    try: return {"CXR_SIM": str(build(tmp_path_factory.mktemp("sim"))), "CXR_TEST_DEVICE": "sim", "PYTHONPATH": f"{ROOT}:{ROOT/'tests'}"}
    except OSError as e: pytest.skip(str(e))


@pytest.mark.slow
def test_refuses(there): run(["python", "-c", CHECK], env=there)


@pytest.mark.slow
def test_as_on_a_gpu(there):
    "The tests of the GPU that ask for the same results, a training, and that no step waits."
    o = run(["python", "-m", "pytest", "-p", "simulated_device", "tests/test_gpu.py", "-q", "-k", "same or 32 and (trains or no_waiting)"], env=there)
    assert "17 passed" in o.text and "skipped" not in o.text, o.text
