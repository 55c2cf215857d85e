-- The runs of the store, and how good each is.
--
-- Grain:   one row per run of the store, the newest first, damaged ones too.
-- Reads:   stg_runs
-- Units:   tokens_artefact names the tokens that were encoded: runs of the same tokens can be compared. l0 is the
--          number of features per token; k is the number that was asked for (null if none was).
--          model is the folder or name of the language model, null if the records do not say. n_bytes is the size of
--          the values and their statistics on disk, written the time (UTC) at which they were last published. state is
--          ready, or the first of these: damaged (problem says why), partly encoded (tokens or documents came since),
--          not evaluated.
--          engine is the inference engine that made the activations, null if saeflow ran the model.
--          l0_missed says how far l0 is from k if that is more than 5%.
--          variance_unexplained, dead_share and loss_recovered_… are shares. quality holds every measure as JSON. They
--          are null until the run is evaluated. longest_share is the share of all squared lengths that the longest
--          0.1% of the tokens hold; if it is large (massive activations), compare runs by
--          variance_unexplained_without_longest.
-- Ask it:  which run recovers most of the loss at which l0?
create or replace view runs as
select
    name,
    schema_name,
    fp,
    is_current,
    facts ->> 'site'                                     as site,
    facts ->> 'architecture'                             as architecture,
    (facts ->> 'n_features')::bigint                     as n_features,
    (facts ->> 'k')::bigint                              as k,
    facts ->> 'engine'                                   as engine,
    n_tokens,
    model,
    tokens_artefact,
    n_bytes,
    written,
    case
        when problem is not null then 'damaged'
        when not is_whole then 'partly encoded'
        when quality is null then 'not evaluated'
        else 'ready'
    end                                                  as state,
    (quality ->> 'l0')::double                           as l0,
    case
        when l0 > 1.05 * k or l0 < 0.95 * k
        then printf('%.0f%% %s k', 100 * abs(l0 / k - 1), case when l0 > k then 'above' else 'below' end)
    end                                                  as l0_missed,
    (quality ->> 'variance_unexplained')::double         as variance_unexplained,
    (quality ->> 'variance_unexplained_without_longest')::double as variance_unexplained_without_longest,
    (quality ->> 'longest_share')::double                as longest_share,
    (quality ->> 'dead_share')::double                   as dead_share,
    (quality ->> 'loss_recovered_zero')::double          as loss_recovered_zero,
    (quality ->> 'loss_recovered_mean')::double          as loss_recovered_mean,
    quality,
    problem
from stg_runs
order by place;
