# SPDX-License-Identifier: Apache-2.0
"""ament_python package `virst_ros`; the folder engine/ is installed as `virst_engine`."""

from glob import glob

from setuptools import find_packages, setup

PACKAGE, ENGINE = "virst_ros", "virst_engine"  # ENGINE is the import name of the folder engine/

setup(
    name=PACKAGE,
    version="0.1.0",
    description="Real-time, language-guided video segmentation for robots",
    license="Apache-2.0",
    maintainer="virst_ros developers",
    maintainer_email="maintainers@virst-ros.org",
    python_requires=">=3.10",
    packages=[
        PACKAGE,
        *(f"{PACKAGE}.{name}" for name in find_packages(PACKAGE)),
        ENGINE,
        *(f"{ENGINE}.{name}" for name in find_packages("engine")),
    ],
    package_dir={ENGINE: "engine"},
    package_data={ENGINE: ["py.typed", "weights/*", "weights/*/*"], PACKAGE: ["demo/*.npz"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        (f"share/{PACKAGE}/launch", [*glob("launch/*.launch.py"), *glob("launch/*.xml")]),
        (f"share/{PACKAGE}/launch/params", glob("launch/params/*")),
        (f"share/{PACKAGE}/launch/rviz", glob("launch/rviz/*")),
        (f"share/{PACKAGE}/launch/foxglove", glob("launch/foxglove/*")),
    ],
    install_requires=[
        "numpy",
        "torch>=2.5",
        "jaxtyping",
        "safetensors",
        "opencv-python-headless",
        "transformers>=4.50",
        "hydra-core",
        "iopath",
        "pillow",
        "tqdm",
        "pyzmq",
        "msgpack",
        "typer",
        "rich",
    ],
    extras_require={
        "sim": ["mujoco"],
        "demo": ["imageio-ffmpeg"],
        "grounding": ["scipy"],  # what transformers needs for OWLv2; other detectors need nothing more
        "bag": ["rosbags"],  # `virst segment` on rosbag2 and MCAP files
        "quantised": ["bitsandbytes>=0.50"],  # virst-reasoner --weight-bits 8 or 4
        "train": ["tensorboard"],
        "plot": ["matplotlib"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        # TensorRT itself comes with the machine (a Jetson) or from NVIDIA's index; RTX compiles without a GPU, too.
        "tensorrt-rtx": ["tensorrt-rtx-cu13; sys_platform == 'linux' and platform_machine == 'x86_64'"],
        "test": ["pytest", "pytest-timeout", "hypothesis", "beartype", "psutil", "pyyaml"],
        "lint": ["ruff", "mypy", "pre-commit"],
    },
    tests_require=["pytest"],  # colcon test looks for this to choose pytest
    entry_points={
        "console_scripts": [
            "virst = virst_engine.cli:main",
            "virst-reasoner = virst_engine.slow.zmq_server:main",
            "virst-goal = virst_ros.goal:main",
            "virst-contracts = virst_ros.contracts:main",
            "virst-overhead = virst_ros.overhead:main",
            "segmenter = virst_ros.segmenter_node:main",
            "sim_camera = virst_ros.sim_camera_node:main",
        ],
        # Commands of the program `virst` that need ROS: the engine finds them here, and never imports them itself.
        "virst_engine.commands": [
            "faults = virst_ros.faults.command:faults",
            "soak = virst_ros.soak:command",
        ],
    },
)
