"""All settings are in settings.ini: edit there, not here."""
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
readme = here/"README.md"


class BuildWithRecipes(build_py):
    "Puts the recipes and the two notebooks that papermill runs into the wheel, so that no copy of them is kept in git."

    def run(self):
        super().run()
        if self.editable_mode: return  # the working tree has them already
        lib = Path(self.build_lib)/cfg["lib_name"]
        for source, target in self.shipped():
            (lib/target).mkdir(parents=True, exist_ok=True)
            copy2(source, lib/target)

    def shipped(self):
        yield from ((o, "_recipes") for o in sorted((here/"configs").glob("*.yaml")))
        yield from ((here/"nbs"/o, "_notebooks") for o in ("04_train.ipynb", "05_eval.ipynb"))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=cfg["git_url"],
    package_data={cfg["lib_name"]: ["class_maps/*.yaml", "folds/*", "maps/*", "weights/*"]},
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"]+".*"]),
    python_requires=">="+cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "dicom": cfg["dicom_requirements"].split(), "imagenet": cfg["imagenet_requirements"].split(), "ui": ["mlflow>=3.1,<4"]},
    entry_points={
        "console_scripts": [o.strip() for o in cfg["console_scripts"].splitlines() if o.strip()],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    classifiers=["Intended Audience :: Science/Research", "Programming Language :: Python :: 3",
                 "Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12",
                 "Programming Language :: Python :: 3.13"],
    zip_safe=False,
    cmdclass={"build_py": BuildWithRecipes},
)
