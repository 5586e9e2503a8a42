"""What devices send one another, read from HLO."""

from phi3_jax.performance.collectives import count_collectives, layer_collectives

# Cut down from XLA's texts: a gather in three pieces, a sum as a ring of permutations, a loop that is not the layers'.
HLO = """\
HloModule jit_step

%start.1 (p.1: bf16[1,4,8]) -> (bf16[1,4,8], bf16[1,16,8], u32[]) {
  %p.1 = bf16[1,4,8]{2,1,0} parameter(0)
  %all-gather.1 = bf16[1,16,8]{2,1,0} all-gather(%p.1), channel_id=3, frontend_attributes={chain_id="0"}, metadata={op_name="gather"}
}

%done.1 (p.2: bf16[1,4,8]) -> bf16[1,16,8] {
  %all-gather.2 = bf16[1,16,8]{2,1,0} all-gather(%p.2), channel_id=3, frontend_attributes={chain_id="0"}, metadata={op_name="gather"}
}

%forward.1 (state: (bf16[1,4,8])) -> (bf16[1,4,8]) {
  %begin = (bf16[1,4,8], bf16[1,16,8], u32[]) fusion(%state), kind=kCustom, calls=%start.1
  %kernel = bf16[1,4,8] custom-call(%begin), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"text": 1
}}, metadata={op_name="kernel"}
  %end = bf16[1,16,8] fusion(%begin), kind=kCustom, calls=%done.1
  %all-gather.3 = bf16[1,64,2]{2,1,0} all-gather(%k), channel_id=1, metadata={op_name="keys"}
  %all-gather.4 = bf16[1,64,2]{2,1,0} all-gather(%v), channel_id=1, metadata={op_name="keys"}
}

%backward.1 (state: (bf16[1,4,8])) -> (bf16[1,4,8]) {
  %permute.1 = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=5, metadata={op_name="dot" stack_frame_id=7}
  %permute-done.1 = f32[2,8]{1,0} collective-permute-done(%permute.1), metadata={op_name="dot" stack_frame_id=7}
  %permute.2 = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%b), channel_id=6, metadata={op_name="dot" stack_frame_id=7}
  %permute.3 = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%c), channel_id=7, metadata={op_name="dot" stack_frame_id=9}
  %all-reduce.1 = (f32[3]{0}, f32[4]{0}) all-reduce(%x, %y), channel_id=8, to_apply=%sum.1
}

ENTRY %main (p: bf16[1,4,8]) -> bf16[1,4,8] {
  %all-reduce.9 = s32[] all-reduce(%n), channel_id=9, to_apply=%sum.1
  %while.1 = (bf16[1,4,8]) while(%t), condition=%c.1, body=%forward.1, metadata={op_name="jit(step)/jvp(jit(_forward))/while"}
  %while.2 = (bf16[1,4,8]) while(%t), condition=%c.1, body=%start.1, metadata={op_name="jit(step)/jvp(jit(_sums))/while"}
  %while.3 = (bf16[1,4,8]) while(%t), condition=%c.1, body=%backward.1, metadata={op_name="jit(step)/transpose(jvp(jit(_forward)))/while"}
}

%sum.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%c.1 (t: (bf16[1,4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n)
}
"""  # noqa: E501


def test_collectives_are_counted_once_and_by_loop():
    loops = layer_collectives(HLO)
    assert count_collectives(loops["forward"]) == {"all-gather bf16[1,16,8]": 1, "all-gather bf16[1,64,2]": 2}
    assert count_collectives(loops["backward"]) == {
        "collective-permute f32[2,8]": 2,
        "all-reduce f32[3], f32[4]": 1,
    }


def test_a_program_of_one_device_has_none():
    assert layer_collectives("ENTRY %main (p: f32[]) -> f32[] {\n}\n") == {"forward": [], "backward": []}
