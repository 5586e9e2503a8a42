"""A step's HLO, cut down from libtpu's: one of each form that the readers of such texts have to know."""

_CYCLES = 'backend_config={{"estimated_cycles":"{}"}}'


def _step() -> str:
    def cycles(number: int) -> str:
        return _CYCLES.format(number)

    return f"""\
HloModule jit_step, is_scheduled=true

%sliced (p.0: bf16[32,16384,3072], p.1: bf16[4,2048,3072], p.2: s32[]) -> bf16[4,2048,16384] {{
  %p.0 = bf16[32,16384,3072]{{2,1,0}} parameter(0)
  %p.1 = bf16[4,2048,3072]{{2,1,0}} parameter(1)
  %p.2 = s32[] parameter(2)
  %slice = bf16[1,16384,3072]{{2,1,0}} dynamic-slice(%p.0, %p.2, %p.2, %p.2), dynamic_slice_sizes={{1,16384,3072}}
  %view = bf16[16384,3072]{{1,0}} bitcast(%slice)
  ROOT %dot = bf16[4,2048,16384]{{2,1,0}} dot(%p.1, %view), lhs_contracting_dims={{2}}, rhs_contracting_dims={{1}}
}}

%inner (q.0: bf16[32,16384,3072], q.1: s32[]) -> bf16[16384,3072] {{
  %q.0 = bf16[32,16384,3072]{{2,1,0}} parameter(0)
  %q.1 = s32[] parameter(1)
  %taken = bf16[1,16384,3072]{{2,1,0}} dynamic-slice(%q.0, %q.1, %q.1, %q.1), dynamic_slice_sizes={{1,16384,3072}}
  ROOT %seen = bf16[16384,3072]{{1,0}} bitcast(%taken)
}}

%outer (r.0: bf16[32,16384,3072], r.1: s32[]) -> bf16[16384,3072] {{
  %r.0 = bf16[32,16384,3072]{{2,1,0}} parameter(0)
  %r.1 = s32[] parameter(1)
  ROOT %within = bf16[16384,3072]{{1,0}} fusion(%r.0, %r.1), kind=kLoop, calls=%inner
}}

%thin (p.3: bf16[4,2048,3072], p.4: bf16[16,3072]) -> bf16[4,2048,16] {{
  %p.3 = bf16[4,2048,3072]{{2,1,0}} parameter(0)
  %p.4 = bf16[16,3072]{{1,0}} parameter(1)
  ROOT %convolution = bf16[4,2048,16]{{2,1,0}} convolution(%p.3, %p.4), window={{size=1}}, dim_labels=0bf_oi->0bf
}}

%in_place (p.5: bf16[8,4,2048,3072], p.6: bf16[1,4,2048,3072], p.7: s32[]) -> bf16[8,4,2048,3072] {{
  %p.5 = bf16[8,4,2048,3072]{{3,2,1,0}} parameter(0)
  %p.6 = bf16[1,4,2048,3072]{{3,2,1,0:T(8,128)(2,1)S(1)}} parameter(1)
  %p.7 = s32[] parameter(2)
  ROOT %written = bf16[8,4,2048,3072]{{3,2,1,0}} dynamic-update-slice(%p.5, %p.6, %p.7, %p.7, %p.7, %p.7)
}}

%gathering (p.8: bf16[2048,3072]) -> bf16[16384,3072] {{
  %p.8 = bf16[2048,3072]{{1,0}} parameter(0)
  ROOT %all-gather.9 = bf16[16384,3072]{{1,0}} all-gather(%p.8), channel_id=2, dimensions={{0}}
}}

%layer (state: (bf16[4,2048,3072])) -> (bf16[4,2048,3072]) {{
  %state = (bf16[4,2048,3072]{{2,1,0}}) parameter(0)
  %x = bf16[4,2048,3072]{{2,1,0}} get-tuple-element(%state), index=0
  %i = s32[] constant(0)
  %weights = bf16[32,16384,3072]{{2,1,0}} get-tuple-element(%state), index=1
  %a = bf16[16,3072]{{1,0}} get-tuple-element(%state), index=2
  %codes = u8[16384,1536]{{1,0}} get-tuple-element(%state), index=3
  %part = bf16[2048,3072]{{1,0}} get-tuple-element(%state), index=4
  %w.1 = bf16[9216,3072]{{1,0}} get-tuple-element(%state), index=5
  %x.1 = bf16[8192,3072]{{1,0}} bitcast(%x)
  %product = bf16[4,2048,16384]{{2,1,0}} fusion(%weights, %x, %i), kind=kOutput, calls=%sliced, {cycles(3_000_000)}
  %narrow = bf16[4,2048,16]{{2,1,0}} fusion(%x, %a), kind=kOutput, calls=%thin, {cycles(1_000_000)}
  %turned = bf16[4,2048,32,96]{{3,2,1,0}} copy(%x), metadata={{op_name="jit(step)/rope/mul"}}, {cycles(500_000)}
  %dense = bf16[16384,3072]{{1,0}} convert(%codes), metadata={{op_name="jit(step)/mul"}}, {cycles(700_000)}
  %bits = u32[4,2048,3072]{{2,1,0}} add(%x, %x), metadata={{op_name="jit(step)/threefry2x32"}}, {cycles(100_000)}
  %gated = bf16[4,2048,8192]{{2,1,0}} multiply(%x, %x), metadata={{op_name="jit(step)/mlp/mul"}}, {cycles(200_000)}
  %all-gather.1 = bf16[16384,3072]{{1,0}} all-gather(%part), channel_id=1, dimensions={{0}}
  %async-start = ((bf16[2048,3072]), bf16[16384,3072], s32[]) async-start(%part), calls=%gathering
  %async-done = bf16[16384,3072]{{1,0}} async-done(%async-start)
  %permute-start = (f32[2,8]{{1,0}}, f32[2,8]{{1,0}}, u32[], u32[]) collective-permute-start(%a), channel_id=5
  %permute-done = f32[2,8]{{1,0}} collective-permute-done(%permute-start)
  %splash_mha_fwd.1 = bf16[4,32,2048,96]{{3,2,1,0}} custom-call(%x, %x, %x), custom_call_target="tpu_custom_call"
  %product_kernel.3 = bf16[8192,9216]{{1,0}} custom-call(%x.1, %w.1), custom_call_target="tpu_custom_call"
  ROOT %out = (bf16[4,2048,3072]{{2,1,0}}) tuple(%x)
}}

%limit (t: (s32[])) -> pred[] {{
  %eight = s32[] constant(8)
  ROOT %less = pred[] compare(%t, %eight), direction=LT
}}

%filled (u: (f32[64,96])) -> (f32[64,96]) {{
  %u = (f32[64,96]{{1,0:T(8,128)}}) parameter(0)
  %v = f32[64,96]{{1,0:T(8,128)}} get-tuple-element(%u), index=0
  %copy.1 = f32[64,96]{{1,0:T(8,128)}} copy(%v), {cycles(10_000)}
  ROOT %w = (f32[64,96]{{1,0:T(8,128)}}) tuple(%copy.1)
}}

%first (b.1: f32[8]) -> f32[8] {{
  %b.1 = f32[8]{{0}} parameter(0)
  ROOT %quick = f32[8]{{0}} negate(%b.1), {cycles(1_000)}
}}

%second (b.2: f32[8]) -> f32[8] {{
  %b.2 = f32[8]{{0}} parameter(0)
  ROOT %slow = f32[8]{{0}} exponential(%b.2), {cycles(400_000)}
}}

ENTRY %main (x.9: bf16[4,2048,3072], q: bf16[8,64,128], k: bf16[8,96,128], r: f32[8], s: s32[]) -> f32[8] {{
  %x.9 = bf16[4,2048,3072]{{2,1,0}} parameter(0)
  %q = bf16[8,64,128]{{2,1,0}} parameter(1)
  %k = bf16[8,96,128]{{2,1,0}} parameter(2)
  %r = f32[8]{{0}} parameter(3)
  %s = s32[] parameter(4)
  %all = bf16[8,4,2048,3072]{{3,2,1,0}} broadcast(%r), dimensions={{}}
  %row = bf16[1,4,2048,3072]{{3,2,1,0:T(8,128)(2,1)S(1)}} bitcast(%x.9)
  %norm = bf16[4,2048,3072]{{2,1,0}} multiply(%x.9, %x.9), metadata={{op_name="jit(step)/norm/mul"}}, {cycles(1_000_000)}
  %update = bf16[8,4,2048,3072]{{3,2,1,0}} fusion(%all, %row, %s), kind=kLoop, calls=%in_place
  %batched = bf16[8,64,96]{{2,1,0}} convolution(%q, %k), window={{size=8 stride=7 pad=0_0 lhs_dilate=8}}, dim_labels=0bf_0oi->0bf, metadata={{op_name="jit(step)/jit(_sums)/dot_general"}}, {cycles(2_000_000)}
  %stack = bf16[32,16384,3072]{{2,1,0}} bitcast(%x.9)
  %nested = bf16[16384,3072]{{1,0}} fusion(%stack, %s), kind=kLoop, calls=%outer
  %moment = f32[8]{{0}} add(%r, %r), metadata={{op_name="jit(step)/optimizer/add"}}, {cycles(100_000)}
  %while.1 = (bf16[4,2048,3072]{{2,1,0}}) while(%norm), condition=%limit, body=%layer, backend_config={{"known_trip_count":{{"n":"32"}}}}
  %while.2 = (f32[64,96]{{1,0}}) while(%r), condition=%limit, body=%filled
  ROOT %chosen = f32[8]{{0}} conditional(%s, %r, %r), branch_computations={{%first, %second}}
}}
"""  # noqa: E501


STEP = _step()
