"""CLDA inside MIC for segmentation: the plug-in is that of ``examples/daformer``, which fits MIC and HRDA too."""
