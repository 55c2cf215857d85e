-- The tokens that a run leaves out, counted by the setting and by vocabulary entry.
--
-- Grain:   one row per reason and vocabulary entry, the most frequent first.
-- Reads:   stg_tokens, stg_left_out, skip_reason, stg_vocab
-- Units:   reason is position (activations.skip_positions), special (skip_special), role (roles) or length
--          (skip_norms_above). A token counts under the first that applies. max_length is the greatest length of a
--          vector that was too long, in the units of the activations (null for other reasons). Padding and forgotten
--          documents do not count.
-- Ask it:  which tokens are attention sinks (reason = 'length')?
create or replace view left_out as
with found as (
    select skip_reason(token_id, vocab_id) as reason, vocab_id, null::float as length from stg_tokens where mask
    union all
    select 'length', vocab_id, length from stg_left_out
)
select reason, vocab_id, any_value(piece) as piece, count(*) as n_tokens, max(length)::double as max_length
from found
left join stg_vocab using (vocab_id)
where reason is not null
group by reason, vocab_id
order by n_tokens desc, reason, vocab_id;
