"""Files in and out: video, prompts, manifests, cameras, points; every write is atomic (all or nothing).

Nothing here is imported on `import vggrpo.io`, so a command that only reads prompts never loads a video codec.
"""
