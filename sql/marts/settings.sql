-- The settings that the run was made with, and those that are not the recipe's defaults.
--
-- Grain:   one row per setting or fact that the records of the run's stages hold, those that differ from the default
--          first, then by section and setting.
-- Reads:   stg_settings
-- Units:   section and setting are names of the recipe; a section that is a stage (saes, features) holds facts that are
--          no setting. value and usual, the default, are JSON. differs is true if they are not equal, and null if there
--          is no default. about is the setting's description.
-- Ask it:  what was changed in this run?
create or replace view settings as
select
    section::varchar                                      as section,
    setting::varchar                                      as setting,
    value::varchar                                        as value,
    usual::varchar                                        as usual,
    case when usual is not null then value <> usual end   as differs,
    about::varchar                                        as about
from stg_settings
order by differs desc nulls last, section, setting;
