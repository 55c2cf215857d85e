-- Which vocabulary entries become more or less likely when a feature is changed.
--
-- Grain:   one row per (effect, entry): the entries that moved most in total, the most first. No rows before
--          `saeflow effects` has run.
-- Reads:   stg_effects, stg_direct_effects, stg_vocab
-- Units:   only entries among the few that moved most at a firing are counted: n_up and n_down firings of n_firings.
--          mean_change is the change of the probability, summed over these firings and divided by n_firings.
--          log_change is the mean change of the log probability, over the firings that count the entry.
--          direct_change is the mean of what the change adds to the entry's logit without passing a later layer (see
--          feature_logits), over the same firings; null without a direct path, and where tokens_ahead is not 0.
--          name is the measurement's name; null means all.
-- Parameters: feature bigint, name text = null, tokens_ahead bigint = 0, n bigint = 20
-- Ask it:  what does the model say more often without feature 12?  from effects_on_entries(12)
create or replace macro effects_on_entries(feature, name := null, tokens_ahead := 0, n := 20) as table
with mine as materialized (
    select * from stg_effects
    where feature_id = feature and ahead = tokens_ahead and coalesce(effect = name, name is null)
),
counts as (
    select effect, count(*) as n_firings from mine group by effect
),
moved as (
    select
        effect,
        set_to - value      as amount,
        true                as is_up,
        unnest(up_ids)      as vocab_id,
        unnest(up_before)::double as old_share,
        unnest(up_after)::double  as new_share
    from mine
    union all
    select
        effect, set_to - value, false, unnest(down_ids), unnest(down_before)::double, unnest(down_after)::double
    from mine
),
direct as (
    select effect, vocab_id, logit from stg_direct_effects where feature_id = feature and tokens_ahead = 0
),
summed as (
    select
        effect,
        vocab_id,
        count(*) filter (where is_up)                          as n_up,
        count(*) filter (where not is_up)                      as n_down,
        sum(new_share - old_share)                             as total,
        avg(ln(greatest(new_share, 1e-45::double)) - ln(greatest(old_share, 1e-45::double))) as log_change,
        avg(amount)                                            as mean_amount
    from moved
    group by effect, vocab_id
)
select
    effect,
    vocab_id,
    stg_vocab.piece,
    n_up,
    n_down,
    n_firings,
    total / n_firings     as mean_change,
    log_change,
    mean_amount * logit   as direct_change
from summed
join counts using (effect)
join stg_vocab using (vocab_id)
left join direct using (effect, vocab_id)
order by abs(total / n_firings) desc, effect, vocab_id
limit n;
