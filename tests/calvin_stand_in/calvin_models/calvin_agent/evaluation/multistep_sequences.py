"""The chains: a scene's state and five tasks, of which 5, 1, 0 and 2 can be solved in a row."""

LED, OPEN, SLIDE, NEVER = "turn_on_led", "open_drawer", "move_slider_left", "close_drawer"
TASKS = [
    (LED, OPEN, SLIDE, OPEN, SLIDE),
    (OPEN, LED, NEVER, SLIDE, OPEN),
    (NEVER, OPEN, SLIDE, LED, OPEN),
    (OPEN, SLIDE, NEVER, LED, OPEN),
]


def get_sequences(num_sequences=1000, num_workers=None):
    state = {"led": 0, "lightbulb": 0, "slider": "right", "drawer": "closed", "grasped": 0}
    return [(state, TASKS[number % 4]) for number in range(num_sequences)]
