-- Firings at which a change of a feature moved the model most, with their context and the entries that moved.
--
-- Grain:   one row per (effect, token), the largest KL divergence first. No rows before `saeflow effects` has run.
-- Reads:   stg_effects, stg_vocab, token_texts
-- Units:   value is the feature's own, set_to what it was set to, in the units of the activations. loss_change and kl
--          are in nats. up lists the entries that gained most probability, down those that lost most, the most first.
--          tokens_ahead 0 is the prediction at the changed token. context shows `before` tokens in front of the changed
--          token and `after` behind it. name is the measurement's name; null means all.
-- Parameters: feature bigint, name text = null, tokens_ahead bigint = 0, n bigint = 20, before bigint = 12,
--          after bigint = 12
-- Ask it:  where does the model need feature 12 most?  from effect_contexts(12)
create or replace macro effect_contexts(
    feature,
    name := null,
    tokens_ahead := 0,
    n := 20,
    before := 12,
    after := 12
) as table
with best as materialized (
    select * from stg_effects
    where feature_id = feature and ahead = tokens_ahead and coalesce(effect = name, name is null)
    order by kl desc, effect, token_id
    limit n
),
moved as (
    select effect, token_id, true as is_up, unnest(up_ids) as vocab_id, generate_subscripts(up_ids, 1) as rank from best
    union all
    select effect, token_id, false, unnest(down_ids), generate_subscripts(down_ids, 1) from best
),
spelt as (
    select
        effect,
        token_id,
        list(stg_vocab.piece order by rank) filter (where is_up)     as up,
        list(stg_vocab.piece order by rank) filter (where not is_up) as down
    from moved
    join stg_vocab using (vocab_id)
    group by effect, token_id
)
select
    effect,
    token_id,
    best.value,
    best.set_to,
    best.loss_change,
    best.kl,
    coalesce(spelt.up, [])   as up,
    coalesce(spelt.down, []) as down,
    found.piece,
    found.context,
    found.key,
    found.source,
    found.position
from best
left join spelt using (effect, token_id)
join token_texts((select list(distinct token_id) from best), before, after) as found using (token_id)
order by best.kl desc, effect, token_id;
