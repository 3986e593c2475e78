"""What our evaluator uses of CALVIN, with the names, arguments and forms of the real packages.

| stand-in | real file |
| --- | --- |
| `calvin_env/envs/play_table_env.py` | that of mees/calvin_env: `get_env`, `PlayTableSimEnv` |
| `calvin_env/envs/tasks.py` | its `Tasks.get_task_info_for_set` and two of the base functions |
| `calvin_agent/evaluation/multistep_sequences.py`, `utils.py` | those of mees/calvin |
| `calvin_models/conf` | task and wording files of mees/calvin |
| `hydra`, `omegaconf` | `instantiate`, `OmegaConf.load` and `to_container` |

The drawer opens by 5 cm and the slider by 2 cm at every step, whatever the robot does, and the first step
after a reset turns the LED on. `open_drawer` thus takes 3 steps, `move_slider_left` 8, `turn_on_led` 1 at the
start of a chain, and `close_drawer` never succeeds.
"""

__version__ = "0.0.1"
