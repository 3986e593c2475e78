"""The oracle."""

from functools import partial


class Tasks:
    def __init__(self, tasks):
        self.tasks = {name: partial(getattr(self, kind), *rest) for name, (kind, *rest) in tasks.items()}

    def get_task_info_for_set(self, start_info, end_info, task_filter):
        """Names of the tasks in the set `task_filter` that were done between the two."""
        assert isinstance(task_filter, set)
        infos = {"start_info": start_info, "end_info": end_info}
        return {name for name in task_filter if self.tasks[name](**infos)}

    @staticmethod
    def move_door_rel(joint_name, threshold, start_info, end_info):
        start, end = (
            info["scene_info"]["doors"][joint_name]["current_state"] for info in (start_info, end_info)
        )
        return end - start > threshold if threshold > 0 else end - start < threshold

    @staticmethod
    def toggle_light(light_name, start_state, end_state, start_info, end_info):
        states = [
            info["scene_info"]["lights"][light_name]["logical_state"] for info in (start_info, end_info)
        ]
        return states == [start_state, end_state]
